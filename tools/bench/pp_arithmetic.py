"""What arithmetic says of a pipeline of stages: how fast it can be, and what each stage sends."""

from __future__ import annotations

from typing import Final

_STATUS: Final = 1
"""Bytes that say with each message whether a stage has failed."""


def ideal(stages: int, micro_batches: int, virtual: int = 1) -> float:
    """Speed-up over one process of micro-batches that all meet again at every step.

    Args:
        stages: How many ranks.
        micro_batches: Branches of guidance, times the parts of a batch.
        virtual: Chunks on each rank.
    """
    larger, smaller = max(micro_batches, stages), min(micro_batches, stages)
    return micro_batches * stages * virtual / (larger * virtual + smaller - 1)


def ideal_of_requests(stages: int, requests: int, branches: int) -> float:
    """Speed-up of requests that don't wait for each other, once the pipeline is full."""
    return min(stages, requests * ideal(stages, branches))


def ideal_of_patches(stages: int, steps: int, exact: int, exact_ideal: float) -> float:
    """Speed-up of patches that follow each other from step to step, after some exact steps.

    Args:
        stages: How many ranks.
        steps: Of an image.
        exact: How many of them come first, and are not cut into patches.
        exact_ideal: Speed-up of these.
    """
    return steps / (exact / exact_ideal + (steps - exact) / stages)


def bytes_of_step(
    stages: int, virtual: int, micro_batches: int, flow: float, result: float
) -> tuple[float, ...]:
    """Bytes that each stage sends in a step.

    Every chunk but the last sends what flows on to the next; the last stage sends the result to
    all others.

    Args:
        stages: How many ranks.
        virtual: Chunks on each.
        micro_batches: How many go through the stages.
        flow: Bytes between two blocks, of one micro-batch.
        result: Bytes of one's result.
    """
    sent = [0.0] * stages
    for chunk in range(stages * virtual - 1):
        sent[chunk % stages] += micro_batches * (flow + _STATUS)
    sent[-1] += (stages - 1) * micro_batches * (result + _STATUS)
    return tuple(sent)
