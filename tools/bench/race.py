"""The ranks' side of every benchmark: contestants in turn, round by round, on the same ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bench.arithmetic import spread

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Entry:
    """What is timed under one name.

    Attributes:
        name: Name in the results.
        run: The work.
        alone: Rank 0 works while the others wait.
    """

    name: str
    run: Callable[[], Any]
    alone: bool = False


@dataclass(frozen=True)
class Times:
    """What a race measured; the same on every rank.

    Attributes:
        seconds: By round, of the slowest rank, for each name.
        core_share: For each name, the share of a core that the least favoured rank had: the
            median over the rounds of CPU time over time. Waiting for peers lowers it, and so
            does other work on the machine.
    """

    seconds: dict[str, tuple[float, ...]]
    core_share: dict[str, float]


def race(entries: Sequence[Entry], rounds: int, on_step: Callable[[], None]) -> Times:
    """Time the entries in turn: A B C A B C and so on.

    Each starts at a barrier, and its time is that of the slowest rank. Who waits sleeps in a
    collective and takes no time from those at work.
    """
    samples: dict[str, list[tuple[float, float]]] = {entry.name: [] for entry in entries}
    for _ in range(rounds):
        for entry in entries:
            samples[entry.name].append(_time(entry))
            on_step()
    return Times(
        {name: tuple(wall for wall, _ in pairs) for name, pairs in samples.items()},
        {name: spread([share for _, share in pairs]).median for name, pairs in samples.items()},
    )


def _time(entry: Entry) -> tuple[float, float]:
    wall, share = 0.0, 1.0
    dist.barrier()
    if not entry.alone or dist.get_rank() == 0:
        worked, start = time.thread_time(), time.perf_counter()
        entry.run()
        wall = time.perf_counter() - start
        share = (time.thread_time() - worked) / wall
    worst = torch.tensor([wall, -share], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst[0].item(), -worst[1].item()


def from_all_ranks(value: ValueT) -> list[ValueT]:
    """What every rank passed, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def attempt(work: Callable[[], ValueT]) -> tuple[ValueT | None, str | None]:
    """Try something on every rank, so that a contestant that cannot do a case leaves it.

    Returns:
        The result and no problem, or no result and what the first rank that failed said; whether
        it worked is the same on every rank.
    """
    result, problem = None, None
    try:
        result = work()
    except Exception as error:  # whatever a contestant raises, the others are to go on
        text = " ".join(str(error).split())
        problem = f"{type(error).__name__}: {text}"
    problems = [text for text in from_all_ranks(problem) if text is not None]
    return (None, problems[0]) if problems else (result, None)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Largest difference on any rank, relative to the largest value of the reference."""
    largest = (output.float() - reference.float()).abs().max() / reference.float().abs().max()
    return max(from_all_ranks(largest.item()))
