"""Bytes that the busiest rank sends for one step, by strategy: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from omni_parallel.plan.recorded_call import Attended, Block
from omni_parallel.plan.workload import Workload

_STATUS = 1
"""Bytes that say with each message between stages whether one has failed."""


def attention_bytes(attended: Sequence[Attended], ulysses: int, ring: int) -> tuple[float, float]:
    """What a rank sends in attention: of exchanged heads, and of keys and values passed on.

    Ulysses exchanges query, key, value and result over its ranks; Ring gives key and value of a
    rank's heads to each of its own.
    """
    ranks = ulysses * ring
    exchanged = sum(2 * one.query_bytes + 2 * one.key_bytes for one in attended)
    passed_on = sum(2 * one.key_bytes for one in attended)
    return exchanged * (ulysses - 1) / (ulysses * ranks), passed_on * (ring - 1) / ranks


def joined_bytes(whole: int, ranks: int) -> float:
    """What a rank sends so that all have what lies in even pieces on them."""
    return whole * (ranks - 1) / ranks


def guidance_bytes(work: Workload, ranks: int) -> float:
    """What the rank with most branches sends: its predictions, to each of the others."""
    return ceil(work.branches / ranks) * work.prediction_bytes * (ranks - 1.0)


def stage_bytes(flows: Sequence[float], calls: int, result: int) -> float:
    """What the busiest stage sends: to the next one what flows on, or the result to all others.

    Args:
        flows: Bytes of what flows out of each stage but the last, for one call.
        calls: How many go through the stages.
        result: Bytes of the result of one.
    """
    last = len(flows) * calls * (result + _STATUS)
    return max([*(calls * (flow + _STATUS) for flow in flows), last] if flows else [0])


def gathered_bytes(weights: int, ranks: int, forwards: int) -> float:
    """What a rank sends of its share of weights, which all gather in each forward."""
    return forwards * joined_bytes(weights, ranks)


def cached_bytes(blocks: Sequence[Block], work: Workload, branches: int) -> int:
    """Keys and values that PipeFusion keeps of the step before, for some blocks."""
    kept = sum(2 * one.key_bytes for block in blocks for one in work.shared(block))
    return branches * kept
