"""A stage that fails ends the call on every rank, with its error, and the stages stay usable."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from toy_stages import ToyPipeline, ToyTransformer, alone, close, guided, stages

from omni_group_coordinator import ParallelError
from omni_parallel_state import ParallelLayout, ParallelState
from rank_harness import RankPool


class BrokenError(Exception):
    """What a block fails with."""


def break_block(block: nn.Module, calls: int) -> Any:
    """Have a block fail after so many calls."""
    left = [calls]

    def check(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            msg = "this block is broken"
            raise BrokenError(msg)

    return block.register_forward_pre_hook(check)


@torch.no_grad()
def fail(stage: int, calls: int, virtual: int, kind: dict[str, Any]) -> str:
    pipeline = ToyPipeline()
    with stages(pipeline, 3, virtual_stages=virtual) as handle:
        me = handle.partitions["transformer"].stage
        hook = (
            break_block(list(pipeline.transformer.blocks.children())[-1], calls)
            if me == stage
            else None
        )
        try:
            pipeline(**guided(**kind))
        except BrokenError as error:
            text = f"own: {error}"
        except ParallelError as error:
            text = str(error)
        if hook is not None:
            hook.remove()
        found = pipeline(**guided(1, **kind)).sample
        close(found, alone(guided(1, **kind)))
    return text


@pytest.mark.parametrize("kind", [{}, {"doubled": True, "rows": 2}])
@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("calls", [0, 1, 5])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_rank_ends_with_the_error_of_the_stage(
    ranks: RankPool, stage: int, calls: int, virtual: int, kind: dict[str, Any]
) -> None:
    texts = ranks.run(fail, stage, calls, virtual, kind, world_size=3, timeout=30)
    expected = [f"stage {stage} failed: BrokenError: this block is broken"] * 3
    expected[stage] = "own: this block is broken"
    assert texts == expected


@torch.no_grad()
def other_inputs() -> str:
    """Ranks that are given other prompts, to a denoiser alone."""
    model = ToyTransformer()
    state = ParallelState(ParallelLayout(pp=2), timeout=timedelta(seconds=10))
    rank = state.pp.rank_in_group
    generator = torch.Generator().manual_seed(rank)
    from omni_pp.stages.application import apply_pipeline_parallel

    with apply_pipeline_parallel(model, state=state):
        try:
            model(torch.randn(1, 4, 8, generator=generator), torch.ones(1, 2, 8), torch.ones(1))
        except ParallelError as error:
            return str(error)
    return "none"


def test_stages_that_are_given_other_inputs_are_told(ranks: RankPool) -> None:
    for text in ranks.run(other_inputs):
        assert "ToyTransformer was given other inputs on stage 1 than on stage 0" in text


@torch.no_grad()
def seeds(kind: str) -> Any:
    pipeline = ToyPipeline()
    with stages(pipeline, 2, seeds=kind) as handle:
        rank = handle.partitions["transformer"].stage
        arguments = guided() | {"generator": torch.Generator().manual_seed(rank)}
        try:
            return pipeline(**arguments).sample
        except ParallelError as error:
            return str(error)


def test_ranks_of_other_seeds_make_the_first_ones_picture_or_an_error(ranks: RankPool) -> None:
    first, second = ranks.run(seeds, "broadcast")
    assert torch.equal(first, second)
    assert torch.equal(first, alone(guided()))
    for text in ranks.run(seeds, "error"):
        assert "another random state than group rank 0" in text
