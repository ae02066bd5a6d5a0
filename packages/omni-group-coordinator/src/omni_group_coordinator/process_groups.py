"""Creation of torch process groups: only where needed, and once for each set of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from omni_group_coordinator.errors import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    reason_of,
)
from omni_group_coordinator.utils import DEFAULT_TIMEOUT, check_timeout

__all__ = [
    "CPU_BACKEND",
    "DEFAULT_TIMEOUT",
    "ProcessGroupPool",
    "ProcessGroups",
    "check_backend",
    "rank_lists",
    "serves_cpu",
]

CPU_BACKEND = "gloo"
"""Backend of the groups that carry metadata and barriers."""

# A backend that moves CPU tensors itself needs no second group for metadata. "fake" is
# torch's simulated backend: it moves nothing, so a real gloo group beside it would hang.
_SERVES_CPU = frozenset({"gloo", "fake", "mpi", "ucc"})

T = TypeVar("T")
RankLists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ProcessGroups:
    """The groups over one set of ranks: for tensors on the device, and on the CPU."""

    ranks: tuple[int, ...]
    """Global ranks, in group order."""
    device: ProcessGroup
    cpu: ProcessGroup
    """The same object as `device` where one backend serves both."""


def rank_lists(group_ranks: Sequence[Sequence[int]]) -> RankLists:
    """Check the rank lists of one dimension and freeze them.

    Args:
        group_ranks: One list of global ranks for each group of the dimension.

    Raises:
        ParallelConfigError: They are no lists of ranks, a list is empty, a rank is negative, or a
            rank stands twice.
    """
    if not all(isinstance(ranks, Sequence | range) for ranks in group_ranks):
        msg = (
            f"group_ranks={list(group_ranks)!r} is no list of groups, each of which is a list of "
            "ranks; for one group of the ranks 0 and 1 pass [[0, 1]]"
        )
        raise ParallelConfigError(msg)
    lists = tuple(tuple(int(rank) for rank in ranks) for ranks in group_ranks)
    flat = [rank for ranks in lists for rank in ranks]
    if not flat or not all(lists):
        msg = f"group_ranks={[list(ranks) for ranks in lists]} holds no rank or an empty group"
        raise ParallelConfigError(msg)
    if min(flat) < 0:
        msg = f"group_ranks holds the rank {min(flat)}; ranks start at 0"
        raise ParallelConfigError(msg)
    twice = sorted({rank for rank in flat if flat.count(rank) > 1}) if _repeats(flat) else []
    if twice:
        msg = f"group_ranks holds rank {twice[0]} twice; each rank belongs to one group at most"
        raise ParallelConfigError(msg)
    return lists


def _repeats(flat: Sequence[int]) -> bool:
    return len(set(flat)) != len(flat)


class ProcessGroupPool:
    """Makes torch process groups and owns them.

    A group exists only for rank lists of more than one rank, and once for each distinct set of
    ranks, however many dimensions of a layout ask for it. Group order is ascending rank order:
    that is what torch makes of any list.

    Every rank of the world makes every group, in the same order. torch can also name a group by
    a hash of its ranks and let only the members take part, but that hash holds the number of
    groups that a rank already has, so two ranks with different histories wait for each other for
    ever (read in torch 2.13, ``_hash_ranks_to_str``). A group that a rank is no member of costs
    it some microseconds.

    Args:
        backend: torch backend for tensors on the device, for example ``"nccl"`` or ``"gloo"``.
        timeout: How long a collective of these groups may wait. Default: 10 minutes.
        device: This rank's accelerator, with its index. Its backend then connects when a group is
            made: nccl would else do so at the first message, where a rank of the group that takes
            no part in it is waited for.
    """

    def __init__(
        self,
        backend: str,
        *,
        timeout: timedelta | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.backend = str(backend)
        self.timeout = check_timeout(timeout)
        bound = device is not None and device.type != "cpu" and device.index is not None
        self._device = device if bound and self.backend not in _SERVES_CPU else None
        self._lists: dict[tuple[str, RankLists], ProcessGroups | None] = {}
        self._by_ranks: dict[tuple[str, tuple[int, ...]], ProcessGroups | None] = {}
        self._made: list[ProcessGroup] = []
        self._world: ProcessGroup | None = None  # torch's default group when they were made

    def groups_for(
        self, group_ranks: Sequence[Sequence[int]], *, variant: str = "", name: str = ""
    ) -> ProcessGroups | None:
        """The groups of this rank in one dimension; made at the first call.

        Call it on every rank of the world with the same lists, in the same order.

        Args:
            group_ranks: One list of global ranks for each group of the dimension.
            variant: Groups of another variant over the same ranks are groups of their own, for
                traffic that must not queue behind the first (two directions of a pipeline).
            name: Word for the dimension, in messages and in torch's own descriptions.

        Returns:
            This rank's groups, or ``None`` where it is alone and needs none.

        Raises:
            ParallelConfigError: The lists overlap or name ranks that the world does not have, or
                torch does not have the backend.
            ParallelError: torch's default process group has not been initialised.
            CommunicationError: A rank died or did not come within the timeout.
        """
        lists = rank_lists(group_ranks)
        if all(len(ranks) == 1 for ranks in lists):
            return None
        key = (variant, tuple(sorted(tuple(sorted(ranks)) for ranks in lists)))
        if key not in self._lists:
            self._lists[key] = self._make(lists, variant, name)
        return self._lists[key]

    def _make(self, lists: RankLists, variant: str, name: str) -> ProcessGroups | None:
        rank = _rank_in(lists)
        check_backend(self.backend)
        mine: ProcessGroups | None = None
        for unsorted in lists:
            ranks = tuple(sorted(unsorted))
            if len(ranks) == 1:
                continue
            if (variant, ranks) not in self._by_ranks:
                self._by_ranks[variant, ranks] = self._new(ranks, name, member=rank in ranks)
            if rank in ranks:
                mine = self._by_ranks[variant, ranks]
        if mine is not None:
            # A member that goes on, and perhaps destroys the group, while another is still
            # connecting would break the connection.
            self._run(mine.ranks, name, lambda: dist.barrier(group=mine.cpu))
        return mine

    def _new(self, ranks: tuple[int, ...], name: str, *, member: bool) -> ProcessGroups | None:
        device = self._new_group(ranks, name, self.backend, member=member)
        cpu = device
        if not serves_cpu(self.backend):
            cpu = self._new_group(ranks, name, CPU_BACKEND, member=member)
        return ProcessGroups(ranks, device, cpu) if device and cpu else None

    def _new_group(
        self, ranks: tuple[int, ...], name: str, backend: str, *, member: bool
    ) -> ProcessGroup | None:
        group = self._run(
            ranks,
            name,
            lambda: dist.new_group(
                list(ranks),
                timeout=self.timeout,
                backend=backend,
                group_desc=f"omni/{name}" if name else None,
                device_id=self._device if backend == self.backend else None,
            ),
        )
        if not member or not isinstance(group, ProcessGroup):
            return None
        self._made.append(group)
        self._world = dist.group.WORLD
        return group

    def _run(self, ranks: tuple[int, ...], name: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            called = f"{self.backend} group {name!r}" if name else f"{self.backend} group"
            msg = (
                f"the {called} of ranks {', '.join(map(str, ranks))} could not be made within "
                f"{self.timeout.total_seconds():g} s: {reason_of(error)}\nA rank died, or does "
                "not make the same groups in the same order"
            )
            raise CommunicationError(
                msg, group=name or "new", ranks=ranks, operation="new_group"
            ) from error

    def destroy(self) -> None:
        """Destroy every group that this pool made; a second call does nothing."""
        made, self._made = self._made, []
        self._lists.clear()
        self._by_ranks.clear()
        if dist.group.WORLD is not self._world:
            return  # torch destroyed them together with the default group of their time
        for group in reversed(made):
            dist.destroy_process_group(group)


def check_backend(backend: str) -> None:
    """Check that this build of torch has a backend (or all of ``"cpu:gloo,cuda:nccl"``).

    Raises:
        ParallelConfigError: It has not; names those that it has.
    """
    names = [part.rpartition(":")[2].strip().lower() for part in backend.split(",")]
    missing = [name for name in names if not dist.is_backend_available(name)]
    if missing:
        known = [name for name in dist.Backend.backend_list if name != "undefined"]
        available = ", ".join(name for name in known if dist.is_backend_available(name))
        msg = (
            f"backend={backend!r}: this build of torch has no backend {missing[0]!r}; available "
            f"here: {available}"
        )
        raise ParallelConfigError(msg)


def serves_cpu(backend: str) -> bool:
    """Whether one group of this backend moves CPU tensors too."""
    return backend in _SERVES_CPU or "cpu:" in backend


def _rank_in(lists: RankLists) -> int:
    """This rank, once it is known that every group can be made on every rank."""
    if not dist.is_initialized():
        msg = (
            "a group of more than one rank needs torch's default process group; call "
            "omni_parallel_state.init_distributed_environment() or "
            "torch.distributed.init_process_group() first, in a process started by torchrun"
        )
        raise ParallelError(msg)
    world_size = dist.get_world_size()
    highest = max(max(ranks) for ranks in lists)
    if highest >= world_size:
        msg = (
            f"group_ranks names rank {highest}, but the world has {world_size} ranks; "
            f"legal here: 0 to {world_size - 1}"
        )
        raise ParallelConfigError(msg)
    return dist.get_rank()
