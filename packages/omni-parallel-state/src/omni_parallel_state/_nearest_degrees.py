"""Which degrees would have worked, when it takes more than one change."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from math import lcm, prod

from omni_parallel_state._legal_values import divisors

_SHOWN = 3

_Found = tuple[int, int, tuple[int, ...]]
"""Degrees changed, ranks by which they changed in all, and the degrees: sorts nearest first."""


def covered(degrees: Mapping[str, int]) -> int:
    """Ranks that degrees take: their product, but vae lies over the others instead."""
    block = prod(degree for name, degree in degrees.items() if name != "vae")
    return lcm(block, degrees.get("vae", 1))


def may_change(name: str, degree: int) -> bool:
    """Whether to propose another value: a degree of 1 is off and not asked for, but dp is."""
    return degree > 1 or name == "dp"


def nearest_combinations(
    total: int, degrees: Mapping[str, int], *, exact: bool
) -> list[dict[str, int]]:
    """The legal degrees that change as few of those asked for as possible, and these the least.

    Keeps only the best ways to each divisor of `total`, so that the cost grows with the square of
    the number of divisors, of which no number up to 4,096 has more than 48.

    Args:
        total: What the degrees must cover, or a multiple of that.
        degrees: Those that were asked for; vae, if it is there, comes last.
        exact: They must cover all of `total`; else a divisor of it.

    Returns:
        At most three, all equally near.
    """
    best: dict[int, list[_Found]] = {1: [(0, 0, ())]}
    for name, wanted in degrees.items():
        options = divisors(total) if may_change(name, wanted) else [wanted]
        reached: dict[int, list[_Found]] = {}
        for ranks, found in best.items():
            for degree in options:
                after = lcm(ranks, degree) if name == "vae" else ranks * degree
                if total % after == 0:
                    reached.setdefault(after, []).extend(
                        (
                            changes + (degree != wanted),
                            distance + abs(degree - wanted),
                            (*ds, degree),
                        )
                        for changes, distance, ds in found
                    )
        best = {ranks: sorted(found)[:_SHOWN] for ranks, found in reached.items()}
    ends = sorted(best.get(total, []) if exact else chain.from_iterable(best.values()))
    nearest = [end for end in ends if end[:2] == ends[0][:2]][:_SHOWN]
    return [dict(zip(degrees, found, strict=True)) for _, _, found in nearest]
