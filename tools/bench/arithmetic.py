"""Medians, pairwise ratios and the formulas of the bytes that attention sends."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle half of some values."""

    low: float
    """First quartile."""
    median: float
    high: float
    """Third quartile."""


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, that value three times.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        msg = "no values to summarise"
        raise ValueError(msg)
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def pairwise_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the ratios within each round, which drift of the machine cancels from.

    Raises:
        ValueError: The two don't have the same number of rounds, or have none.
    """
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def pairwise_difference(left: Sequence[float], right: Sequence[float]) -> Spread:
    """Spread of left minus right within each round.

    Raises:
        ValueError: The two don't have the same number of rounds, or have none.
    """
    return spread([a - b for a, b in zip(left, right, strict=True)])


def ceiling(alone: Sequence[float], together: Sequence[float], ranks: int) -> float:
    """The speed-up that this machine allows: what is lost by all ranks computing at once.

    Args:
        alone: Seconds of one rank while the others wait, by round.
        together: Seconds of the slowest rank when every rank does the whole work, by round.
        ranks: How many.
    """
    return ranks * pairwise_ratio(alone, together).median


def attention_units(ulysses: int, ring: int, kv_share: float = 1.0) -> float:
    """What a rank sends in one attention layer, in units of a whole query of the whole sequence.

    Ulysses exchanges query, key, value and result over its ranks; Ring and AllGather-KV give key
    and value to each of theirs. With one of the degrees at 1 this is ``(2 + 2f)(P - 1) / P**2`` or
    ``2f (P - 1) / P``.

    Args:
        ulysses: Inner degree.
        ring: Outer degree, for Ring and AllGather-KV alike.
        kv_share: Key heads over query heads, f.
    """
    ranks = ulysses * ring
    exchanged = (2 + 2 * kv_share) * (ulysses - 1) / (ulysses * ranks)
    passed_on = 2 * kv_share * (ring - 1) / ranks
    return exchanged + passed_on
