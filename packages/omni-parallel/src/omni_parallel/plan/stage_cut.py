"""Which stage has which blocks, as far as a prediction needs it."""

from __future__ import annotations

from collections.abc import Sequence


def cut(weights: Sequence[int], stages: int) -> list[slice]:
    """Runs of blocks, one or more for each stage, of which the heaviest is as light as can be.

    Args:
        weights: Of each block.
        stages: How many, no more than there are blocks.
    """
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(weights, middle)) <= stages:
            high = middle
        else:
            low = middle + 1
    runs = _filled(weights, low)
    while len(runs) < stages:  # some could be filled with more than there is
        longest = max(range(len(runs)), key=lambda i: runs[i].stop - runs[i].start)
        run = runs[longest]
        middle = (run.start + run.stop) // 2
        runs[longest : longest + 1] = [slice(run.start, middle), slice(middle, run.stop)]
    return runs


def _filled(weights: Sequence[int], most: int) -> list[slice]:
    runs, start, total = [], 0, 0
    for index, weight in enumerate(weights):
        if total + weight > most and index > start:
            runs.append(slice(start, index))
            start, total = index, 0
        total += weight
    return [*runs, slice(start, len(weights))]
