"""Real collectives on real ranks: are they right, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from omni_group_coordinator import GroupCoordinator
from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel_state import (
    ParallelLayout,
    ParallelState,
    destroy_distributed_environment,
    init_distributed_environment,
)

ROUNDS = 5
SMALL, LARGE = 1 << 10, 1 << 22
"""Elements of float32: 4 KB show what a call costs, 16 MB what the link carries."""


@dataclass(frozen=True)
class Measured:
    """One operation between the ranks."""

    operation: str
    right: bool
    """Whether every rank got what arithmetic says."""
    microseconds: float
    """Of a call with 4 KB on each rank."""
    gigabytes_per_second: float
    """That each rank sends, of 16 MB on each."""


@dataclass(frozen=True)
class SelfTest:
    """What the ranks measured."""

    backend: str
    device: str
    operations: list[Measured] = field(default_factory=list)
    links: dict[str, float] = field(default_factory=dict)
    """GB/s of messages between two ranks, ``"0-1"``, one way."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@record
def run_self_test(device: str | None) -> dict[str, Any] | None:
    """What one rank does; runs in a process of the launcher.

    Returns:
        `SelfTest` as plain data on rank 0, else None.
    """
    end_with_launcher()
    torch.set_num_threads(1)
    world = init_distributed_environment(device=device)
    state = ParallelState(ParallelLayout(dp=world.world_size), device)
    try:
        found = measure(state)
    finally:
        state.destroy()
        destroy_distributed_environment()
    return found.to_dict() if state.rank == 0 else None


def measure(state: ParallelState) -> SelfTest:
    """All operations, and the links between pairs of ranks, of the world of a state."""
    group = state.world
    peers = group.world_size - 1
    share = peers / group.world_size
    cases: tuple[tuple[str, Callable[[Tensor], Tensor], Callable[[int], Tensor], float], ...] = (
        ("all-reduce", group.all_reduce, lambda n: _sum(group, n), 2 * share),
        (
            "all-gather",
            lambda x: group.all_gather(x, 0),
            lambda n: _gathered(group, n),
            group.world_size - 1,
        ),
        (
            "all-to-all",
            lambda x: group.all_to_all(x.view(group.world_size, -1), 0, 1).flatten(),
            lambda n: _exchanged(group, n),
            share,
        ),
    )
    operations = [
        _measured(state, name, run, expected, sends) for name, run, expected, sends in cases
    ]
    return SelfTest(state.backend, str(state.device), operations, _links(state))


def _part(rank: int, elements: int) -> Tensor:
    return torch.arange(elements, dtype=torch.float32).remainder_(251) + 1000 * rank


def _length(group: GroupCoordinator, elements: int) -> int:
    return elements // group.world_size * group.world_size


def _sum(group: GroupCoordinator, elements: int) -> Tensor:
    return torch.stack([_part(rank, elements) for rank in range(group.world_size)]).sum(0)


def _gathered(group: GroupCoordinator, elements: int) -> Tensor:
    return torch.cat([_part(rank, elements) for rank in range(group.world_size)])


def _exchanged(group: GroupCoordinator, elements: int) -> Tensor:
    pieces = [_part(rank, elements).chunk(group.world_size) for rank in range(group.world_size)]
    return torch.cat([piece[group.rank_in_group] for piece in pieces])


def _measured(
    state: ParallelState,
    name: str,
    run: Callable[[Tensor], Tensor],
    expected: Callable[[int], Tensor],
    sends: float,
) -> Measured:
    group = state.world
    small, large = _length(group, SMALL), _length(group, LARGE)
    mine = _part(group.rank_in_group, small).to(state.device)
    right = torch.equal(run(mine.clone()).cpu(), expected(small))
    everywhere = all(group.all_gather_object(right))
    short = _seconds(state, lambda: run(mine.clone()))
    whole = _part(group.rank_in_group, large).to(state.device)
    long = _seconds(state, lambda: run(whole.clone()))
    return Measured(name, everywhere, short * 1e6, sends * large * 4 / long / 1e9)


def _links(state: ParallelState) -> dict[str, float]:
    group = state.world
    found = {}
    for first in range(group.world_size):
        for second in range(first + 1, group.world_size):
            seconds = _seconds(state, partial(_message, state, first, second))
            found[f"{first}-{second}"] = LARGE * 4 / seconds / 1e9
    return found


def _message(state: ParallelState, first: int, second: int) -> None:
    group = state.world
    if group.rank_in_group == first:
        group.send(torch.zeros(LARGE, device=state.device), second)
    elif group.rank_in_group == second:
        group.recv((LARGE,), torch.float32, first)


def _seconds(state: ParallelState, run: Callable[[], Any]) -> float:
    """Median over rounds of the slowest rank."""
    taken = []
    for _ in range(ROUNDS + 1):
        state.world.barrier()
        start = time.perf_counter()
        run()
        if state.device.type != "cpu":
            torch.accelerator.synchronize(state.device)
        taken.append(time.perf_counter() - start)
    slowest: float = max(state.world.all_gather_object(statistics.median(taken[1:])))
    return slowest
