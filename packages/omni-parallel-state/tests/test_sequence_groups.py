"""Ulysses and Ring groups inside given sequence-parallel groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from omni_parallel_state import (
    ParallelConfigError,
    ParallelLayout,
    sequence_subgroups,
    set_seq_parallel_pg,
)

if TYPE_CHECKING:
    from rank_harness import RankPool


def test_ulysses_is_contiguous_and_ring_strided_in_groups_that_are_not_consecutive() -> None:
    ulysses, ring = sequence_subgroups([[0, 2, 4, 6], [1, 3, 5, 7]], 2, 2)

    assert ulysses == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert ring == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_the_other_way_round_on_request() -> None:
    ulysses, ring = sequence_subgroups([[0, 1, 2, 3, 4, 5]], 2, 3, use_ulysses_low=False)

    assert ulysses == [[0, 3], [1, 4], [2, 5]]
    assert ring == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("ulysses", "ring", "tp"), [(2, 2, 1), (3, 2, 2), (1, 4, 2), (4, 1, 3)])
def test_they_are_the_groups_of_the_layout(ulysses: int, ring: int, tp: int) -> None:
    layout = ParallelLayout(dp=2, ring=ring, ulysses=ulysses, tp=tp)
    found = sequence_subgroups(layout.groups("sp"), ulysses, ring)

    for dim, groups in zip(("ulysses", "ring"), found, strict=True):
        assert {tuple(group) for group in groups} == set(layout.groups(dim))


def sums(arguments: tuple[Any, ...]) -> list[int]:
    rank = dist.get_rank()
    found = []
    for group in set_seq_parallel_pg(*arguments[:2], rank, *arguments[2:]):
        bits = torch.tensor([2**rank])
        if group is not None:
            dist.all_reduce(bits, group=group)
        found.append(int(bits))
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2, 2, 4), [[0b0011, 0b0101], [0b0011, 0b1010], [0b1100, 0b0101], [0b1100, 0b1010]]),
        ((2, 1, 4), [[0b0011, 1], [0b0011, 2], [0b1100, 4], [0b1100, 8]]),
        ((1, 1, 4), [[1, 1], [2, 2], [4, 4], [8, 8]]),
        (
            (1, 2, 4, True, [[0, 2], [1, 3]]),
            [[1, 0b0101], [2, 0b1010], [4, 0b0101], [8, 0b1010]],
        ),
    ],
)
def test_groups_of_torch_are_made_over_these_ranks(
    ranks: RankPool, arguments: tuple[Any, ...], expected: list[list[int]]
) -> None:
    assert ranks.run(sums, arguments, world_size=4) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 2, 0, 6), "does not divide the world of 6 ranks; nearest legal: ulysses: 1, 3"),
        ((2, 1, 5, 4), "rank 5 is in none of"),
        ((2, 2, 0, 4, True, [[0, 1]]), "lays out 4 ranks, but the world has 2; .*ulysses: 1"),
        ((0, 1, 0, 4), "ulysses=0"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        set_seq_parallel_pg(*arguments)
