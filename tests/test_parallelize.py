"""What `omni_parallel.parallelize` makes of stock pipelines is what one process makes."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import omni_parallel
from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1 import application
from omni_parallel.v1.parallel_config import STRATEGIES, ParallelConfig
from omni_parallel.v1.problems import NOT_TOGETHER, find_problems
from omni_parallel_state import ParallelLayout, ParallelState

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from stock_pipelines import CASES, picture

import compositions_guide
from compositions import FUSED, LAYOUTS, PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Stock:
    """A stock pipeline, and its picture of one process."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        self.pipeline = self.case.build()
        self.options: dict[str, Any] = {}
        if name == PIPELINES[0]:
            self.pipeline.vae = CASES["Stable Diffusion, two images decoded"].build().vae
            self.pipeline.vae.register_to_config(shift_factor=0.0)
            self.options = {"output_type": "pt"}
        self.alone = self.make(self.pipeline)

    def make(self, call: Any) -> torch.Tensor:
        return picture(call(**self.case.arguments(self.pipeline) | self.options))

    def error(self, call: Any) -> float:
        return float((self.make(call) - self.alone).abs().max() / self.alone.abs().max())


@torch.no_grad()
def errors(name: str, layouts: tuple[str, ...]) -> dict[str, float]:
    """Of the picture of each layout; they are swapped in one process."""
    stock = Stock(name)
    found = {}
    for layout in layouts:
        with omni_parallel.parallelize(stock.pipeline, layout) as ready:
            found[layout] = stock.error(ready)
            assert ready.vae is stock.pipeline.vae
        assert torch.equal(stock.make(stock.pipeline), stock.alone)
    return found


FEW = [
    (world_size, layouts[first : first + 3])
    for world_size, layouts in LAYOUTS.items()
    for first in range(0, len(layouts), 3)
]


@pytest.mark.parametrize(("world_size", "layouts"), FEW)
def test_compositions(ranks, world_size, layouts):
    for found in ranks.run(errors, PIPELINES[0], layouts, world_size=world_size, timeout=110):
        assert list(found) == list(layouts)
        assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("name", PIPELINES[1:])
def test_compositions_of_other_pipelines(ranks, name):
    layouts = ("auto", "ulysses=2,ring=2,hsdp=4", "pp=2,cfg=2")
    for found in ranks.run(errors, name, layouts, world_size=4, timeout=110):
        assert max(found.values()) <= 1e-5, found


@torch.no_grad()
def patches_of_exact_steps(layout: str) -> float:
    stock = Stock(PIPELINES[0])
    options = {"pipefusion": {"warmup_steps": 50}}
    config = {**ParallelConfig.parse(layout).to_dict(), "options": options}
    with omni_parallel.parallelize(stock.pipeline, config) as ready:
        return stock.error(ready)


@pytest.mark.parametrize("layout", sum(FUSED.values(), ()))
def test_compositions_with_pipefusion(ranks, layout):
    world_size = ParallelConfig.parse(layout).ranks
    for found in ranks.run(patches_of_exact_steps, layout, world_size=world_size):
        assert found <= 1e-5


def test_every_pair_is_tested_or_refused_and_the_guide_says_which() -> None:
    text = compositions_guide.GUIDE.read_text(encoding="utf-8")
    assert compositions_guide.updated(text) == text
    pairs = {frozenset(pair) for pair in combinations(STRATEGIES, 2)}
    assert {frozenset(pair) for pair in NOT_TOGETHER} <= pairs
    for layout in sum((*LAYOUTS.values(), *FUSED.values()), ()):
        assert find_problems(ParallelConfig.parse(layout), ParallelConfig.parse(layout).ranks) == []


@torch.no_grad()
def given_a_state() -> tuple[bool, float]:
    stock = Stock("Wan")
    state = ParallelState(ParallelLayout(ulysses=2))
    with pytest.raises(ParallelConfigError, match="but the state given has"):
        omni_parallel.parallelize(stock.pipeline, "cfg=2", state=state)
    with omni_parallel.parallelize(stock.pipeline, "ulysses=2", state=state) as ready:
        error = stock.error(ready)
    alive = not state.destroyed
    state.destroy()
    return alive, error


def test_a_state_that_is_given_stays(ranks):
    for alive, error in ranks.run(given_a_state, world_size=2):
        assert alive
        assert error <= 1e-5


@torch.no_grad()
def half_way() -> list[str]:
    stock = Stock("Wan")
    said = []
    for config in (
        {"cfg": 2, "options": {"cfgp": {"division": "thirds"}}},
        {"cfg": 2, "options": {"cfgp": {"divide": "rows"}}},
        {"ulysses": 2, "options": {"cfgp": {"division": "rows"}}},
        "cfg=2,vae_patch=2",
    ):
        with pytest.raises(ParallelConfigError) as caught:
            omni_parallel.parallelize(stock.pipeline, config)
        said.append(str(caught.value))
    assert torch.equal(stock.make(stock.pipeline), stock.alone)
    return said


def test_what_cannot_be_leaves_the_pipeline_alone(ranks):
    for division, option, unused, vae in ranks.run(half_way, world_size=2):
        assert "division='thirds'" in division
        assert "divide: no option of CFGParallelConfig here; legal: division" in option
        assert "options for 'cfgp', which the degrees leave off" in unused
        assert "WanPipeline has no autoencoder; legal: 1" in vae
        assert "nearest legal: cfg=2" in vae


@torch.no_grad()
def twice() -> list[str]:
    stock = Stock("Wan")
    said = []
    with omni_parallel.parallelize(stock.pipeline, "pp=2"):
        for target in (stock.pipeline, stock.pipeline.transformer):
            with pytest.raises(ParallelConfigError) as caught:
                omni_parallel.parallelize(target, "ulysses=2")
            said.append(str(caught.value))
    with omni_parallel.parallelize(stock.pipeline, "ulysses=2") as ready:
        assert stock.error(ready) <= 1e-5
    return said


def test_a_second_layout_waits_for_the_end_of_the_first(ranks):
    for said in ranks.run(twice, world_size=2):
        for text in said:
            assert "this WanTransformer3DModel is shared already, as pp=2; call remove()" in text


@pytest.mark.parametrize("target", ["path/to/model", 3, object()])
def test_what_holds_no_module_is_refused(target: object) -> None:
    with pytest.raises(ParallelConfigError, match="holds no module; legal: a pipeline that was"):
        omni_parallel.parallelize(target, "auto")


def test_one_process_is_left_alone() -> None:
    stock = Stock("Wan")
    forward = stock.pipeline.transformer.forward
    with torch.no_grad(), omni_parallel.parallelize(stock.pipeline) as ready:
        assert ready.config == ParallelConfig()
        assert stock.pipeline.transformer.forward == forward
        assert torch.equal(stock.make(ready), stock.alone)
        ready.scheduler = scheduler = type(ready.scheduler).from_config(ready.scheduler.config)
        assert stock.pipeline.scheduler is scheduler
        assert "scheduler" not in vars(ready)
    assert ready.removed
    with pytest.raises(ParallelConfigError, match="cfg=2 does not divide the world of 1 rank"):
        omni_parallel.parallelize(stock.pipeline, "cfg=2")


def test_only_what_nobody_places_is_moved() -> None:
    plain, offloaded = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    offloaded._hf_hook = object()
    components = {"unet": plain, "vae": offloaded, "scheduler": None}
    application._move(SimpleNamespace(components=components), torch.device("meta"))
    assert plain.weight.device.type == "meta"
    assert offloaded.weight.device.type == "cpu"


def test_a_pipeline_on_the_accelerator_of_another_rank_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = torch.nn.Linear(2, 2)
    elsewhere = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(module, "parameters", lambda: iter([elsewhere]))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = r"Linear is on cuda:0, but this is local rank 1; .* or put it on cuda:1"
    with pytest.raises(ParallelConfigError, match=said):
        application._check_place(module, None)
    application._check_place(module, "cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    application._check_place(module, None)
    # Where each process sees one device, that one is its own.
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    application._check_place(module, None)


class OfAThirdParty:
    """A strategy with options that its signature names."""

    name = "mine"

    def apply(self, target: Any, state: ParallelState, *, strength: int = 1) -> Any:
        raise NotImplementedError


def test_options_that_a_strategy_does_not_name_are_refused() -> None:
    given = {"mine": {"strength": 2, "colour": "red"}}
    with pytest.raises(ParallelConfigError, match="takes no option colour; legal: strength"):
        application.check_options({"mine": OfAThirdParty()}, given)
    application.check_options({"mine": OfAThirdParty()}, {"mine": {"strength": 2}})
