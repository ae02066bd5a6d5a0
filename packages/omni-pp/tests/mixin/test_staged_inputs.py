"""Ranks that start a request from other inputs are told, or go on with those of the first."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from toy_results import text_of
from toy_staged_pipelines import WIDTH, Staged, in_stages, seeded


class Seeded(Staged):
    """Starts from latents of a seed of its own."""

    seeds: Sequence[int] = ()

    def diffuse(self, **options: Any) -> Any:  # type: ignore[override]
        rank = torch.distributed.get_rank()
        self.own = seeded(1, 6, WIDTH, seed=self.seeds[rank])
        return super().diffuse(**options)

    def predicted(self, latents: Any, prompts: Any, t: Any, options: Any) -> Any:
        first = not self.seen
        return super().predicted(self.own if first else latents, prompts, t, options)


def with_seeds(seeds: Sequence[int], rule: str) -> tuple[str, Any]:
    class Mine(Seeded):
        cfg_seeds = rule

    pipeline, found = Mine(), []
    pipeline.seeds = seeds
    error = text_of(lambda: found.append(pipeline.diffuse(steps=1)["latents"]))
    with contextlib.suppress(IndexError):
        return error, found[0]
    pipeline.seeds = [6] * 4
    assert torch.equal(pipeline.diffuse()["latents"], Staged().diffuse()["latents"])
    return error, None


@pytest.mark.parametrize(
    ("seeds", "text"),
    [((1, 1, 1, 2), "stage 1 starts"), ((1, 1, 2, 2), "column 1 starts"), ((1, 2, 1, 2), "stage")],
)
def test_ranks_that_start_from_other_latents_are_told(ranks: Any, seeds: Any, text: str) -> None:
    for error, _ in ranks.run(in_stages, 2, 2, with_seeds, seeds, "error", world_size=4):
        assert error.startswith(f"RankMismatchError: {text}")
        assert "their shapes are equal, their values are not" in error


def test_columns_may_go_on_with_the_latents_of_the_first(ranks: Any) -> None:
    """For predictions; those that the scheduler is given are compared by the guidance mixin."""
    results = ranks.run(in_stages, 2, 2, with_seeds, (1, 1, 2, 2), "broadcast", world_size=4)
    assert [error for error, _ in results] == ["none"] * 4
    assert all(torch.equal(found, results[0][1]) for _, found in results)
