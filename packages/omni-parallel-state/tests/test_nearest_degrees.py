"""What an error proposes is legal and nearest, and costs little to find."""

from __future__ import annotations

import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_parallel_state import ParallelConfigError, ParallelLayout
from omni_parallel_state._nearest_degrees import covered, nearest_combinations


def by_trying_all(total: int, degrees: dict[str, int], exact: bool) -> list[dict[str, int]]:
    """Every combination that is as near as the nearest one."""
    ranges = [
        range(1, total + 1) if degree > 1 or name == "dp" else (degree,)
        for name, degree in degrees.items()
    ]
    legal: dict[tuple[int, int], list[dict[str, int]]] = {}
    for values in product(*ranges):
        found = dict(zip(degrees, values, strict=True))
        ranks = covered(found)
        if ranks == total if exact else total % ranks == 0:
            steps = [abs(value - degrees[name]) for name, value in found.items()]
            legal.setdefault((sum(map(bool, steps)), sum(steps)), []).append(found)
    return legal[min(legal)] if legal else []


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([("dp", "cfg", "tp"), ("fs", "replicate", "vae"), ("ulysses", "tp")]),
    st.lists(st.integers(1, 7), min_size=3, max_size=3),
    st.integers(1, 24),
    st.booleans(),
)
def test_the_combinations_are_the_nearest_of_all(
    names: tuple[str, ...], values: list[int], total: int, exact: bool
) -> None:
    degrees = dict(zip(names, values, strict=False))
    found = nearest_combinations(total, degrees, exact=exact)
    assert found == by_trying_all(total, degrees, exact)[:3]


@pytest.mark.parametrize("world_size", [2520, 4096])
def test_the_search_is_cheap_in_a_large_world(world_size: int) -> None:
    degrees = {"cfg": 13, "pp": 11, "ring": 13, "ulysses": 17, "tp": 19}
    start = time.process_time()
    with pytest.raises(ParallelConfigError, match=r"nearest legal: dp=\d+ [*] cfg=\d+ [*] pp=\d+"):
        ParallelLayout.for_world(world_size, dp=11, **degrees)  # type: ignore[arg-type]
    assert time.process_time() - start < 1
