"""Wording of errors about degrees: which values would have worked, nearest first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from omni_group_coordinator import ParallelConfigError

_SHOWN = 6


def divisors(number: int) -> list[int]:
    """All positive divisors in ascending order."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def nearest(values: Iterable[int], wanted: int, count: int = _SHOWN) -> list[int]:
    """The `count` values closest to `wanted`, in ascending order."""
    return sorted(sorted(set(values), key=lambda value: (abs(value - wanted), value))[:count])


def listing(values: Iterable[int]) -> str:
    """Numbers as text: ``"1, 2, 4"``."""
    return ", ".join(str(value) for value in values)


def product_text(degrees: Mapping[str, int]) -> str:
    """A product with all its factors: ``"cfg=2 * ulysses=4 = 8"``; factors of 1 are left out."""
    factors = [f"{name}={degree}" for name, degree in degrees.items() if degree != 1]
    if len(factors) < 2:
        return factors[0] if factors else "a product of degrees of 1"
    return f"{' * '.join(factors)} = {prod(degrees.values())}"


def ranks_text(count: int) -> str:
    """``"1 rank"`` or ``"2 ranks"``."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def check_degree(name: str, degree: object) -> int:
    """The degree itself, if it is a whole number of ranks.

    Raises:
        ParallelConfigError: `degree` is no integer, or below 1.
    """
    if isinstance(degree, bool) or not isinstance(degree, int):
        msg = (
            f"{name}={degree!r} is a {type(degree).__name__}; a degree is a whole number of ranks, "
            "1 (off) or more"
        )
        raise ParallelConfigError(msg)
    if degree < 1:
        msg = (
            f"{name}={degree} is no degree; a degree is a number of ranks, so the nearest legal "
            f"value is {name}=1, which means off"
        )
        raise ParallelConfigError(msg)
    return degree
