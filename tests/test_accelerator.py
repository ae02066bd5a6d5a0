"""On accelerators, ranks make of a stock pipeline what one process makes of it there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import omni_parallel
from omni_parallel.v1.parallel_config import ParallelConfig

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "omni-pp" / "tests"))
from accelerator_ranks import NEEDED, HostSyncs, on, run
from deepened_pipelines import deepen
from stock_pipelines import CASES, picture

from compositions import FUSED, LAYOUTS, PIPELINES

pytestmark = [
    NEEDED,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

ALONE = ("ulysses=2", "ring=2", "cfg=2", "pp=2", "hsdp=2", "vae_patch=2")
OPTIONS = {"pipefusion": {"warmup_steps": 50}}
"""All steps exact ones."""


class Stock:
    """A stock pipeline on a device, and its picture of one process."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        deep: bool = False,
    ) -> None:
        self.case = CASES[name]
        self.deep = deep  # of blocks enough for four stages
        self.device, self.dtype = device, dtype or torch.float32
        self.decodes = name == PIPELINES[0]
        pipeline = self.build().to(device)
        self.alone = self.make(pipeline)

    def build(self) -> Any:
        """One more, on the CPU."""
        pipeline = self.case.build()
        if self.decodes:
            pipeline.vae = CASES["Stable Diffusion, two images decoded"].build().vae
            pipeline.vae.register_to_config(shift_factor=0.0)
        if self.deep:
            for part in self.case.denoisers:
                model = getattr(pipeline, part)
                deepen(model)
                model.register_to_config(num_layers=4)
        return pipeline if self.dtype is torch.float32 else pipeline.to(self.dtype)

    def make(self, call: Any, **more: Any) -> torch.Tensor:
        """A picture."""
        arguments = on(self.device, self.case.arguments(self.build()))
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                arguments[name] = value.to(self.dtype)
        if self.decodes:
            arguments["output_type"] = "pt"
        return picture(call(**arguments | more)).float()

    def error(self, call: Any) -> float:
        """Of a picture, relative to its largest value."""
        return float((self.make(call) - self.alone).abs().max() / self.alone.abs().max())


def config_of(layout: str) -> dict[str, Any]:
    config = ParallelConfig.parse(layout)
    options = {name: OPTIONS[name] for name in config.strategies() if name in OPTIONS}
    return {**config.to_dict(), "options": options}


def errors(
    device: torch.device, name: str, layouts: tuple[str, ...], dtype: torch.dtype | None
) -> dict[str, float]:
    """Of the pictures of layouts; of the second, what was cut at the first call is in use."""
    deep = any(ParallelConfig.parse(layout).ranks > 2 for layout in layouts)
    stock = Stock(name, device, dtype, deep=deep)
    found = {}
    for layout in layouts:
        pipeline = stock.build()
        with omni_parallel.parallelize(pipeline, config_of(layout), device=device) as ready:
            assert ready.state.device == device
            found[layout] = max(stock.error(ready) for _ in range(2))
        found[f"{layout}, undone"] = stock.error(pipeline)
    return found


EACH = [
    *((PIPELINES[0], 2, (layout,)) for layout in (*ALONE, *FUSED[2], *LAYOUTS[2])),
    (PIPELINES[0], 3, ("ulysses=3", "ring=3", "vae_patch=3", "hsdp=3")),
    *((PIPELINES[0], 4, (layout,)) for layout in (*LAYOUTS[4], *FUSED[4])),
    *((name, 2, ALONE[:5]) for name in PIPELINES[1:]),
    *((name, 3, ("pp=3", "pipefusion=3")) for name in PIPELINES[1:]),
    (PIPELINES[1], 4, ("pp=4", "pipefusion=4", "pp=2,cfg=2")),
]


@pytest.mark.parametrize(("name", "world_size", "layouts"), EACH)
def test_pictures_are_those_of_one_process(ranks, name, world_size, layouts):
    for found in run(ranks, errors, name, layouts, None, world_size=world_size):
        assert max(found.values()) <= 1e-4, found


def test_pictures_in_half_precision_differ_by_its_rounding(ranks):
    for found in run(ranks, errors, "Wan", ALONE[:5], torch.bfloat16, world_size=2):
        assert max(found.values()) <= 0.1, found


def syncs(device: torch.device, name: str, layout: str | None) -> dict[str, int]:
    """Where the host waits for the device in a step that is neither the first nor the last."""
    stock = Stock(name, device)
    watch = HostSyncs()

    def step_ended(pipeline: Any, step: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            watch.__enter__()
        elif step == 2:
            watch.__exit__()
        return kept

    def call(pipeline: Any) -> None:
        more = {
            "num_inference_steps": 4,
            "callback_on_step_end": step_ended,
            "callback_on_step_end_tensor_inputs": [],
        }
        stock.make(pipeline, **more)

    if layout is None:
        pipeline = stock.build().to(device)
        call(pipeline)
        watch.found.clear()
        call(pipeline)
        return dict(watch.found)
    with omni_parallel.parallelize(stock.build(), config_of(layout), device=device) as ready:
        call(ready)
        watch.found.clear()
        call(ready)
    return dict(watch.found)


@pytest.mark.parametrize("layout", [*ALONE[:5], "pipefusion=2", "cfg=2,ulysses=2", "pp=2,cfg=2"])
@pytest.mark.parametrize("name", ["Wan", "Flux"])
def test_no_step_waits_for_the_device(ranks, name, layout):
    if torch.accelerator.current_accelerator().type != "cuda":
        pytest.skip("only CUDA tells where the host waits")
    (alone,) = run(ranks, syncs, name, None, world_size=1)
    world_size = ParallelConfig.parse(layout).ranks
    for found in run(ranks, syncs, name, layout, world_size=world_size):
        more = {place: count for place, count in found.items() if count > alone.get(place, 0)}
        assert not more, more


def decoding_syncs(device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    stock = Stock(PIPELINES[0], device)
    pipeline = stock.build().to(device)
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(3)).to(device)

    def count() -> dict[str, int]:
        pipeline.vae.decode(latents)
        with HostSyncs() as watch:
            pipeline.vae.decode(latents)
        return dict(watch.found)

    alone = count()
    with omni_parallel.parallelize(pipeline, "vae_patch=2", device=device):
        return alone, count()


def test_no_decoding_waits_for_the_device(ranks):
    if torch.accelerator.current_accelerator().type != "cuda":
        pytest.skip("only CUDA tells where the host waits")
    for alone, found in run(ranks, decoding_syncs, world_size=2):
        more = {place: count for place, count in found.items() if count > alone.get(place, 0)}
        assert not more, more
