"""Which rank computes which branch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_cfgp import assign_branches
from omni_group_coordinator import ParallelConfigError

costs = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=6)


def test_branches_of_one_cost_go_round():
    assert assign_branches([3.0] * 5, 3) == (0, 1, 2, 0, 1)
    assert assign_branches([3.0] * 2, 4) == (0, 1)
    assert assign_branches([3.0] * 3, 1) == (0, 0, 0)
    assert assign_branches([], 2) == ()


def test_a_dear_branch_has_a_rank_for_itself():
    assert assign_branches([9.0, 2.0, 2.0, 2.0], 2) == (0, 1, 1, 1)


def busiest(owners: tuple[int, ...], work: list[float], ranks: int) -> float:
    return max(
        sum(cost for owner, cost in zip(owners, work, strict=True) if owner == rank)
        for rank in range(ranks)
    )


@settings(deadline=None)
@given(costs, st.integers(1, 4))
def test_the_busiest_rank_does_less_than_twice_the_least_that_is_possible(work, ranks):
    found = busiest(assign_branches(work, ranks), work, ranks)
    every = itertools.product(range(ranks), repeat=len(work))
    assert found < 2 * min(busiest(owners, work, ranks) for owners in every)


@pytest.mark.parametrize(
    ("work", "loads"), [([1, 1, 2], [2, 2]), ([1, 1, 1, 3], [3, 3]), ([2, 2, 2], [2, 4])]
)
def test_the_costliest_come_first(work, loads):
    owners = assign_branches(work, 2)
    found = [
        sum(cost for cost, owner in zip(work, owners, strict=True) if owner == r) for r in (0, 1)
    ]
    assert sorted(found) == loads


def test_no_rank_and_negative_costs_are_errors():
    with pytest.raises(ParallelConfigError, match="over 0 ranks; legal: 1 or more"):
        assign_branches([1.0], 0)
    with pytest.raises(ParallelConfigError, match="costs"):
        assign_branches([1.0, -1.0], 2)
