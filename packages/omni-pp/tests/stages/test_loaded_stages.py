"""Pipelines whose denoisers were loaded in parts: used as they are cut, and what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepened_pipelines import build
from stock_pipelines import CASES, picture
from torch import Tensor, nn
from toy_stages import ToyPipeline, ToyTransformer, alone, close, guided, request

from omni_group_coordinator import ParallelConfigError, ParallelError, RankMismatchError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import (
    PipeFusionConfig,
    PipelineParallelConfig,
    apply_pipefusion,
    apply_pipeline_parallel,
    load_stage,
    partition_model,
)
from omni_pp.partition import find_block_lists, partition_of
from rank_harness import RankPool

files = pytest.importorskip("safetensors.torch")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of `ToyTransformer`."""
    files.save_file(ToyTransformer().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def stages_of(count: int) -> ParallelState:
    return ParallelState(ParallelLayout(pp=count))


def toy(folder: Path, state: ParallelState, **cut: Any) -> ToyPipeline:
    return ToyPipeline(
        load_stage(ToyTransformer, folder, PipelineParallelConfig(**cut), state=state)
    )


@torch.no_grad()
def use(folder: Path, world: int, cut: dict[str, Any], applied: dict[str, Any]) -> None:
    state = stages_of(world)
    pipeline = toy(folder, state, **cut)
    model = pipeline.transformer
    before = dict(model.named_parameters())
    part = partition_of(model)
    assert part is not None
    for _ in range(2):
        config = PipelineParallelConfig(**applied)
        with apply_pipeline_parallel(pipeline, config, state=state) as handle:
            assert handle.partitions == {"transformer": part}
            close(pipeline(**guided(rows=2)).sample, alone(guided(rows=2)))
            for result, arguments in zip(
                handle.run_together([guided(0), request(1)]), (guided(0), request(1)), strict=True
            ):
                close(result.sample, alone(arguments))
        # What was not whole before is not made whole, which it might not fit.
        assert partition_of(model) is part
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
    for owner, tensor in part.materialize("cpu"):
        state.pp.broadcast(tensor, src=owner)
    part.restore()
    assert partition_of(model) is None
    for name, value in ToyTransformer().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    close(pipeline(**guided()).sample, alone(guided()))


@pytest.mark.parametrize(
    ("world", "cut", "applied"),
    [
        (2, {}, {}),
        (3, {}, {}),
        (2, {"points": (1,)}, {}),
        (2, {"points": (1,)}, {"points": (1,)}),
        (2, {"virtual_stages": 2}, {}),
        (2, {"virtual_stages": 2}, {"virtual_stages": 2}),
        (2, {"balance": "count"}, {"balance": "count", "block_lists": ("blocks",)}),
    ],
)
def test_a_loaded_part_is_used_as_it_is_cut(
    ranks: RankPool, checkpoint: Path, world: int, cut: dict[str, Any], applied: dict[str, Any]
) -> None:
    ranks.run(use, checkpoint, world, cut, applied, world_size=world)


@torch.no_grad()
def draw(name: str, folder: Path) -> tuple[float, float]:
    """Relative differences from one process: of stages, and of PipeFusion with all steps exact."""
    case = CASES[name]
    whole = build(name)
    expected = picture(whole(**case.arguments(whole)))
    state = stages_of(2)
    pipeline = build(name)
    classes = {part: type(getattr(whole, part)) for part in case.denoisers}
    for part, cls in classes.items():
        model: Any = load_stage(cls, folder, subfolder=part, state=state)
        setattr(pipeline, part, model)
        pipeline.register_modules(**{part: model})
    found: list[Tensor] = []
    with apply_pipeline_parallel(pipeline, state=state):
        found.append(picture(pipeline(**case.arguments(pipeline))))
    if name == "Flux":
        with apply_pipefusion(pipeline, PipeFusionConfig(warmup_steps=99), state=state):
            found.append(picture(pipeline(**case.arguments(pipeline))))
    errors = [float((one - expected).abs().max() / expected.abs().max()) for one in found]
    return errors[0], errors[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Flux", "Wan, two experts"])
def test_stock_pipelines_take_loaded_parts(ranks: RankPool, tmp_path: Path, name: str) -> None:
    pytest.importorskip("diffusers")
    pipeline = build(name)
    for part in CASES[name].denoisers:  # whose blocks were added to
        model = getattr(pipeline, part)
        counts = {key for key in model.config if key in ("num_layers", "num_single_layers")}
        model.register_to_config(**dict.fromkeys(counts, 4))
        assert [found.length for found in find_block_lists(model)] == [4] * len(counts)
    pipeline.save_pretrained(tmp_path)
    for stages, fused in ranks.run(draw, name, tmp_path, timeout=120):
        assert max(stages, fused) <= 1e-5


def refusals(folder: Path) -> dict[str, str]:
    """What is said of a part that is applied in another way than it was cut."""
    found: dict[str, str] = {}

    def refused(what: str, model: nn.Module, state: ParallelState, **options: Any) -> None:
        config = PipelineParallelConfig(**options)
        try:
            apply_pipeline_parallel(ToyPipeline(model), config, state=state).remove()
            found[what] = "none"
        except ParallelConfigError as error:
            found[what] = str(error)

    two, one, turned = stages_of(2), ParallelState(ParallelLayout(dp=2)), 1 - dist.get_rank()
    model = load_stage(ToyTransformer, folder, PipelineParallelConfig(points=(2,)), state=two)
    refused("points", model, two, points=(4,))
    refused("balance", model, two, balance="count")
    refused("virtual", model, two, virtual_stages=2)
    refused("too many", model, two, virtual_stages=4)
    refused("lists", model, two, block_lists=("other",))
    refused("one rank", model, one)
    cut = ToyTransformer()
    partition_model(cut, 2, stage=turned)
    refused("turned", cut, two)
    refused("nothing", model, two)
    return found


def test_a_part_that_is_asked_to_be_cut_elsewhere_is_refused(
    ranks: RankPool, checkpoint: Path
) -> None:
    for found in ranks.run(refusals, checkpoint):
        there = "is cut at (2,) into 2 stages of 1 chunks each already"
        assert there in found["points"]
        assert (
            "is asked to be cut at (4,); legal: the options that it was cut by" in found["points"]
        )
        assert "is asked to be cut at (3,)" in found["balance"]
        assert "is asked to be cut at (" in found["virtual"]
        assert "2 stages of virtual_stages=4 chunks each" in found["too many"]
        assert "block_lists=('other',)" in found["lists"]
        assert "was cut into 2 stages" in found["one rank"]
        assert "on stage 0 of 1;" in found["one rank"]
        assert "transformer was cut into 2 stages, of which this rank has stage" in found["turned"]
        assert found["nothing"] == "none"


def differently(folder: Path) -> str:
    rank = dist.get_rank()
    try:
        load_stage(
            ToyTransformer,
            folder,
            PipelineParallelConfig(points=(2 + rank,)),
            state=stages_of(2),
        )
    except RankMismatchError as error:
        return str(error)
    return "none"


def test_stages_that_would_be_cut_differently_are_told(ranks: RankPool, checkpoint: Path) -> None:
    for text in ranks.run(differently, checkpoint):
        assert "stage 1 was given another configuration than stage 0" in text


def load_from(folders: list[Path]) -> None:
    load_stage(ToyTransformer, folders[dist.get_rank()], state=stages_of(2))


def test_a_file_damaged_on_one_rank_is_an_error_on_all(
    ranks: RankPool, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(checkpoint, other, dirs_exist_ok=True)
    (other / "model.safetensors").write_bytes(b"")
    found = ranks.outcomes(load_from, [checkpoint, other], world_size=2)
    assert [outcome.status for outcome in found] == ["raised", "raised"]
    assert type(found[0].exception) is ParallelError
    assert "rank 1" in str(found[0].exception)
    for outcome in found:
        assert "is damaged or was not copied whole" in str(outcome.exception)


def test_keys_that_do_not_fit_are_all_listed_also_of_other_stages(
    ranks: RankPool, tmp_path: Path
) -> None:
    state = ToyTransformer().state_dict()
    del state["blocks.0.weight"], state["blocks.5.weight"]
    state |= {"extra": torch.ones(2), "head.bias": torch.ones(4)}
    files.save_file(state, tmp_path / "model.safetensors")
    for outcome in ranks.outcomes(load_from, [tmp_path, tmp_path], world_size=2):
        text = str(outcome.exception)
        assert type(outcome.exception) is ParallelConfigError
        assert "missing (2): blocks.0.weight, blocks.5.weight" in text
        assert "unexpected (1): extra" in text
        assert "head.bias is [4] in the checkpoint, [8] in the model" in text


def too_many(folder: Path) -> str:
    try:
        load_stage(
            ToyTransformer, folder, PipelineParallelConfig(virtual_stages=4), state=stages_of(2)
        )
    except ParallelConfigError as error:
        return str(error)
    return "none"


def test_more_chunks_than_blocks(ranks: RankPool, checkpoint: Path) -> None:
    for text in ranks.run(too_many, checkpoint):
        assert "6 blocks, which cannot be cut into 2 stages of virtual_stages=4 chunks" in text
        assert "largest legal: 1 stage or virtual_stages=3" in text


class Tied(ToyTransformer):
    """Blocks that share weights with each other, and with what every stage holds."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 8)
        self.blocks[1].weight = self.blocks[0].weight
        self.blocks[5].weight = self.extra.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.blocks[0].table = self.blocks[5].table = self.table


@torch.no_grad()
def load_tied(folder: Path) -> None:
    state = stages_of(2)
    model = load_stage(Tied, folder, state=state)
    part = partition_of(model)
    assert part is not None
    for owner, tensor in part.materialize("cpu"):
        state.pp.broadcast(tensor, src=owner)
    part.restore()
    assert model.blocks[1].weight is model.blocks[0].weight
    assert model.blocks[5].weight is model.extra.weight
    assert model.blocks[0].table is model.blocks[5].table is model.table
    for name, value in files.load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_is_tied_stays_tied(ranks: RankPool, tmp_path: Path) -> None:
    model = Tied()
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data = torch.randn(parameter.shape, generator=generator)
    once = {id(value): key for key, value in reversed(model.state_dict(keep_vars=True).items())}
    kept = {key: model.state_dict()[key].clone() for key in once.values()}
    assert len(kept) == len(model.state_dict()) - 2
    files.save_file(kept, tmp_path / "model.safetensors")
    ranks.run(load_tied, tmp_path)
