"""Requests that run together give what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_stages import ToyPipeline, alone, close, guided, request, stages

from omni_group_coordinator import ParallelConfigError
from rank_harness import RankPool


@torch.no_grad()
def together(world: int, options: dict[str, Any]) -> None:
    def requests() -> list[dict[str, Any]]:
        return [
            guided(0, steps=4),
            guided(1, steps=2, length=5, text=4),
            request(2, steps=5),
            guided(3, steps=3, doubled=True),
        ]

    pipeline = ToyPipeline()
    with stages(pipeline, world, **options) as handle:
        for _ in range(2):
            found = handle.run_together(requests())
            for one, arguments in zip(found, requests(), strict=True):
                expected = alone(arguments)
                close(one.sample, expected)
        assert torch.equal(pipeline(**guided(5)).sample, alone(guided(5)))


@pytest.mark.parametrize(("world", "virtual"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_requests_of_all_kinds_run_together(ranks: RankPool, world: int, virtual: int) -> None:
    ranks.run(together, world, {"virtual_stages": virtual}, world_size=world, timeout=20)


@torch.no_grad()
def order_of_steps() -> list[str]:
    """Which request each call of a block is of, on one rank."""
    pipeline = ToyPipeline()
    with stages(pipeline, 2) as handle:
        block = next(pipeline.transformer.blocks.children())
        lengths: list[int] = []
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        handle.run_together([request(0, length=4, steps=3), request(1, length=6, steps=2)])
    return lengths


def test_requests_take_turns_in_the_same_order_on_every_rank(ranks: RankPool) -> None:
    assert ranks.run(order_of_steps) == [[4, 6, 4, 6, 4]] * 2


class BadPipeline(ToyPipeline):
    """One of its requests fails."""

    def __call__(self, prompt: Any, **options: Any) -> Any:
        if options.get("length") == 3:
            self.before_step = self._fail
        return super().__call__(prompt, **options)

    @staticmethod
    def _fail(step: int) -> None:
        if step == 1:
            msg = "no step 1"
            raise ValueError(msg)


@torch.no_grad()
def one_fails() -> None:
    pipeline = BadPipeline()
    with stages(pipeline, 2) as handle:
        with pytest.raises(ValueError, match="no step 1"):
            handle.run_together([guided(0), guided(1, length=3), guided(2, length=9)])
        (found,) = handle.run_together([guided(4)])
        assert torch.equal(found.sample, alone(guided(4)))
    with pytest.raises(ParallelConfigError, match="after remove"):
        handle.run_together([guided(0)])


def test_a_request_that_fails_ends_the_others_and_leaves_the_stages_usable(
    ranks: RankPool,
) -> None:
    ranks.run(one_fails)


def test_one_rank_runs_them_one_after_the_other() -> None:
    pipeline = ToyPipeline()
    with torch.no_grad(), stages(pipeline, 1) as handle:
        found = handle.run_together([guided(0), request(1)])
        assert torch.equal(found[0].sample, alone(guided(0)))
        assert torch.equal(found[1].sample, alone(request(1)))
