"""A rank that fails within the executor is an error on all, and the group stays usable."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
import torch.distributed as dist
from operators import pieces_of, world_group
from torch import Tensor

from omni_group_coordinator import ParallelError, RankMismatchError
from omni_vae_patch.autoencoders import DistributedOperator, DistributedVaeExecutor


def fail_at(place: str, rank: int | None, error: type[Exception]) -> DistributedOperator:
    """Fails in a step on a rank, or on all."""
    operator = pieces_of([3, 2, 1], lambda x: x + 1)

    def failing(step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)  # its name, by which the executor knows the shapes of its results
        def run(*args: Any) -> Any:
            if rank is None or dist.get_rank() == rank:
                msg = "planted"
                raise error(msg)
            return step(*args)

        return run

    setattr(operator, place, failing(getattr(operator, place)))
    return operator


def outcomes_of(place: str, rank: int | None, error: type[Exception]) -> tuple[str, str, bool]:
    executor = DistributedVaeExecutor(world_group())
    z = torch.arange(12.0).reshape(2, 6)
    works = pieces_of([3, 2, 1], lambda x: x + 1)
    executor.execute(z, works)
    try:
        executor.execute(z, fail_at(place, rank, error))
    except Exception as caught:
        found = caught
    kinds = [
        name
        for name, kind in (
            ("planted", error),
            ("parallel", ParallelError),
            ("memory", torch.OutOfMemoryError),
        )
        if isinstance(found, kind)
    ]
    return " ".join(kinds), str(found), torch.equal(executor.execute(z, works), z + 1)


@pytest.mark.parametrize("place", ["split", "exec"])
def test_a_failure_on_one_rank_is_an_error_on_all(ranks: Any, place: str) -> None:
    found = ranks.run(outcomes_of, place, 1, KeyError, world_size=3, timeout=30)
    assert [usable for *_, usable in found] == [True] * 3
    assert [kinds for kinds, *_ in found] == ["parallel", "planted", "parallel"]
    assert all("rank 1: KeyError: 'planted'" in found[rank][1] for rank in (0, 2))


def test_a_failure_to_merge_is_an_error_on_all(ranks: Any) -> None:
    found = ranks.run(outcomes_of, "merge", 0, ValueError, world_size=3, timeout=30)
    assert [kinds for kinds, *_ in found] == ["planted", "parallel", "parallel"]
    assert "merging" in found[1][1]
    assert "rank 0: ValueError: planted" in found[1][1]
    assert all(usable for *_, usable in found)


@pytest.mark.parametrize("rank", [1, None])
def test_out_of_memory_is_that_on_every_rank(ranks: Any, rank: int | None) -> None:
    found = ranks.run(outcomes_of, "exec", rank, torch.OutOfMemoryError, world_size=3, timeout=30)
    own, others = "planted memory", "planted parallel memory"
    expected = [own if rank in (None, at) else others for at in range(3)]
    assert [kinds for kinds, *_ in found] == expected
    assert all(usable for *_, usable in found)


def test_out_of_memory_beside_another_error_is_no_matter_of_memory(ranks: Any) -> None:
    def execute() -> str:
        executor = DistributedVaeExecutor(world_group())

        def work(x: Tensor) -> Tensor:
            if dist.get_rank() == 1:
                raise torch.OutOfMemoryError
            if dist.get_rank() == 2:
                raise KeyError
            return x

        try:
            executor.execute(torch.ones(1, 6), pieces_of([3, 2, 1], work))
        except Exception as error:
            return type(error).__name__
        return "none"

    found = ranks.run(execute, world_size=3, timeout=30)
    assert found == ["ParallelError", "OutOfMemoryError", "KeyError"]


def test_ranks_that_cut_differently_are_told(ranks: Any) -> None:
    def execute() -> str:
        executor = DistributedVaeExecutor(world_group())
        lengths = [3, 3] if dist.get_rank() else [4, 2]
        with pytest.raises(RankMismatchError) as caught:
            executor.execute(torch.ones(2, 6), pieces_of(lengths, lambda x: x))
        same = executor.execute(torch.ones(2, 6), pieces_of([4, 2], lambda x: x))
        assert torch.equal(same, torch.ones(2, 6))
        return str(caught.value)

    for text in ranks.run(execute, timeout=30):
        assert "(2, 4)" in text
        assert "(2, 3)" in text


def twice_in_one_place(rank: int | None) -> tuple[str, bool]:
    """The second tile is where the first is, on one rank or on all."""
    executor, z = DistributedVaeExecutor(world_group()), torch.arange(12.0).reshape(2, 6)
    works = pieces_of([3, 2, 1], lambda x: x + 1)
    split = works.split

    def twice(whole: Tensor) -> Any:
        tasks, grid = split(whole)
        if rank is None or dist.get_rank() == rank:
            tasks[1].grid_coord = tasks[0].grid_coord
        return tasks, grid

    try:
        executor.execute(z, DistributedOperator(twice, works.exec, works.merge))
    except ParallelError as error:
        text = f"{type(error).__name__}: {error}"
    return text, torch.equal(executor.execute(z, works), z + 1)


@pytest.mark.parametrize("rank", [1, None])
def test_two_tiles_in_one_place_are_an_error_on_all(ranks: Any, rank: int | None) -> None:
    found = ranks.run(twice_in_one_place, rank, world_size=3, timeout=30)
    for text, usable in found:
        assert text.startswith("ParallelConfigError: ")
        assert "tiles 0 and 1 both at grid_coord=" in text
        assert usable


def nothing_returned(rank: int | None) -> tuple[str, bool]:
    executor, z = DistributedVaeExecutor(world_group()), torch.arange(12.0).reshape(2, 6)
    works = pieces_of([3, 2, 1], lambda x: x + 1)

    def nothing(task: Any) -> Any:
        return None if rank is None or dist.get_rank() == rank else works.exec(task)

    try:
        executor.execute(z, DistributedOperator(works.split, nothing, works.merge))
    except ParallelError as error:
        text = f"{type(error).__name__}: {error}"
    return text, torch.equal(executor.execute(z, works), z + 1)


@pytest.mark.parametrize("rank", [1, None])
def test_a_tile_for_which_nothing_is_returned_is_an_error_on_all(ranks: Any, rank: Any) -> None:
    for text, usable in ranks.run(nothing_returned, rank, world_size=3, timeout=30):
        assert "exec returned a NoneType for the tile at" in text
        assert "legal here: a tensor" in text
        assert usable
