"""What is refused before anything is changed, and what is given back."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from toy_stages import ToyPipeline, ToyTransformer, alone, close, guided, stages

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_parallel_state.denoising.replaced_calls import give_call
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.application import apply_pipeline_parallel
from omni_pp.strategy import strategy
from rank_harness import RankPool


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"virtual_stages": 0}, "virtual_stages=0; legal: a whole number from 1"),
        ({"virtual_stages": True}, "virtual_stages=True"),
        ({"micro_batches": 0}, "micro_batches=0; legal: 'auto' or a whole number from 1"),
        ({"micro_batches": "many"}, "micro_batches='many'"),
        ({"balance": "weight"}, "balance='weight'; legal: 'cost', 'count' or a tuple of costs"),
        ({"balance": (1.0, "a")}, "balance=(1.0, 'a'); legal: a tuple of numbers, 'cost' or"),
        ({"balance": 1.0}, "balance=1.0; legal: a tuple of numbers"),
        ({"points": (2.5,)}, "points=(2.5,); legal: a tuple of whole numbers"),
        ({"block_lists": "blocks"}, "block_lists='blocks'; legal: a tuple of names"),
        ({"seeds": "own"}, "seeds='own'; legal: 'broadcast', 'error'"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ParallelConfigError, match=re.escape(text)):
        PipelineParallelConfig(**options)


def refusal(target: Any, world: int, **options: Any) -> str:
    try:
        stages(target, world, **options)
    except ParallelConfigError as error:
        return str(error)
    return "none"


def refuse() -> dict[str, str]:
    class NoBlocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.first(x)

    cached = ToyPipeline()
    registry = type("Registry", (), {})()
    registry.hooks = {"cache": type("FirstBlock", (), {"_is_stateful": True})()}
    cached.transformer.blocks[1]._diffusers_hook = registry
    named = ToyPipeline()
    found = {
        "too many": refusal(ToyPipeline(), 2, virtual_stages=4),
        "no blocks": refusal(NoBlocks(), 2),
        "no denoiser": refusal(object(), 2),
        "named": refusal(named, 2, denoisers=("unet",)),
        "cached": refusal(cached, 2),
        "points": refusal(ToyPipeline(), 2, points=(6,)),
    }
    assert type(named.transformer) is ToyTransformer
    assert len(named.transformer.blocks) == 6
    twice = ToyPipeline()
    with stages(twice, 2):
        found["twice"] = refusal(twice, 2)
        found["its model"] = refusal(twice.transformer, 2)
    return found


def test_what_cannot_be_cut_is_refused_before_anything_is_changed(ranks: RankPool) -> None:
    first, second = ranks.run(refuse)
    assert first == second
    for name, part in {
        "too many": "6 blocks, which cannot be cut into 2 stages of virtual_stages=4 chunks each",
        "no blocks": "NoBlocks",
        "no denoiser": "object has no component",
        "named": "has no component unet that is a module",
        "cached": "caches features (FirstBlock on blocks.1)",
        "points": "points",
        "twice": "this ToyPipeline is cut into stages already",
        "its model": "this ToyTransformer is cut into stages already",
    }.items():
        assert part in first[name], (name, first[name])


def differ() -> tuple[str, str]:
    state = ParallelState(ParallelLayout(pp=2))
    pipeline = ToyPipeline()
    found = []
    rank = state.pp.rank_in_group
    try:
        apply_pipeline_parallel(
            pipeline, PipelineParallelConfig(virtual_stages=1 + rank), state=state
        )
    except ParallelError as error:
        found.append(str(error))
    give_call(pipeline.transformer, lambda *args, **kwargs: None)
    try:
        apply_pipeline_parallel(pipeline, state=state)
    except ParallelConfigError as error:
        found.append(str(error))
    return found[0], found[1]


def test_other_configurations_and_other_strategies_below_are_told(ranks: RankPool) -> None:
    for configuration, order in ranks.run(differ):
        assert "stage 1 was given another configuration than stage 0" in configuration
        assert "apply the stages first, then guidance over ranks" in order


@torch.no_grad()
def replaced() -> str:
    pipeline = ToyPipeline()
    with stages(pipeline, 2):
        pipeline.transformer = ToyTransformer()
        try:
            pipeline(**guided())
        except ParallelError as error:
            return str(error)
    return "none"


def test_a_denoiser_that_was_replaced_is_an_error(ranks: RankPool) -> None:
    for text in ranks.run(replaced):
        assert "transformer of the pipeline was replaced after apply_pipeline_parallel" in text


@torch.no_grad()
def apply_and_remove() -> None:
    pipeline, whole = ToyPipeline(), ToyPipeline()
    blocks = list(pipeline.transformer.blocks)
    parameters = dict(pipeline.transformer.named_parameters())
    for _ in range(2):
        handle = stages(pipeline, 2)
        held = handle.partitions["transformer"]
        assert any(p.is_meta for block in blocks for p in block.parameters())
        assert held.parameter_bytes == held.promised_bytes(held.stage)
        handle.remove()
        handle.remove()
        assert type(pipeline) is ToyPipeline
        assert type(pipeline.transformer) is ToyTransformer
        assert list(pipeline.transformer.blocks) == blocks
        for name, value in whole.transformer.state_dict().items():
            assert torch.equal(pipeline.transformer.state_dict()[name], value)
        assert torch.equal(pipeline(**guided()).sample, alone(guided()))
    assert list(parameters) == [name for name, _ in pipeline.transformer.named_parameters()]
    kept = stages(pipeline, 2, release=False)
    assert not any(p.is_meta for block in blocks for p in block.parameters())
    kept.remove()


def test_everything_is_given_back(ranks: RankPool) -> None:
    ranks.run(apply_and_remove)


@torch.no_grad()
def anew_and_beside() -> None:
    """Other shapes over the same ranks, by a new cut and by one that is there at the same time."""
    state = ParallelState(ParallelLayout(pp=2))
    for text in (3, 5):
        pipeline = ToyPipeline()
        with apply_pipeline_parallel(pipeline, state=state):
            close(pipeline(**guided(text=text)).sample, alone(guided(text=text)))
    one, other = ToyPipeline(), ToyPipeline()
    with (
        apply_pipeline_parallel(one, state=state),
        apply_pipeline_parallel(other, state=state),
    ):
        for text in (8, 3):
            close(one(**guided(text=text)).sample, alone(guided(text=text)))
            close(other(**guided(text=11 - text)).sample, alone(guided(text=11 - text)))


def test_pipelines_of_other_shapes_over_the_same_ranks(ranks: RankPool) -> None:
    ranks.run(anew_and_beside)


@torch.no_grad()
def leave_by_an_error() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("omni_pp").addHandler(handler)
    pipeline = ToyPipeline()
    with suppress(ZeroDivisionError), stages(pipeline, 2) as handle:
        if handle.partitions["transformer"].stage == 0:
            raise ZeroDivisionError(pipeline)
    return said


def test_an_error_that_one_rank_leaves_by_is_told_before_it_waits(ranks: RankPool) -> None:
    first, second = ranks.run(leave_by_an_error)
    assert len(first) == 1
    assert first[0].startswith("stages are given back after ZeroDivisionError: ")
    assert second == []


@torch.no_grad()
def as_a_strategy() -> None:
    state = ParallelState(ParallelLayout(pp=2))
    pipeline = ToyPipeline()
    with strategy.apply(pipeline, state):
        assert torch.equal(pipeline(**guided()).sample, alone(guided()))


def test_the_strategy_applies_it(ranks: RankPool) -> None:
    assert strategy.name == "pp"
    ranks.run(as_a_strategy)


def test_one_rank_is_the_identity() -> None:
    pipeline = ToyPipeline()
    state = ParallelState(ParallelLayout())
    with torch.no_grad(), apply_pipeline_parallel(pipeline, state=state) as handle:
        assert type(pipeline) is ToyPipeline
        assert type(pipeline.transformer) is ToyTransformer
        assert handle.partitions == {}
        assert torch.equal(pipeline(**guided()).sample, alone(guided()))
