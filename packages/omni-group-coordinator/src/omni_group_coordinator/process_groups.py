"""Creation of torch process groups: only where needed, and once for each set of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from omni_group_coordinator.errors import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
)

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for its peers before it fails."""

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
        ParallelConfigError: A list is empty, a rank is negative, or a rank stands twice.
    """
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
    """

    def __init__(self, backend: str, *, timeout: timedelta | None = None) -> None:
        self.backend = str(backend)
        self.timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        self._lists: dict[tuple[str, RankLists], ProcessGroups | None] = {}
        self._by_ranks: dict[tuple[str, tuple[int, ...]], ProcessGroups | None] = {}
        self._made: list[ProcessGroup] = []
        self._world: ProcessGroup | None = None  # torch's default group when they were made

    def groups_for(
        self, group_ranks: Sequence[Sequence[int]], *, variant: str = ""
    ) -> ProcessGroups | None:
        """The groups of this rank in one dimension; made at the first call.

        Call it on every rank of the world with the same lists, in the same order.

        Args:
            group_ranks: One list of global ranks for each group of the dimension.
            variant: Groups of another variant over the same ranks are groups of their own, for
                traffic that must not queue behind the first (two directions of a pipeline).

        Returns:
            This rank's groups, or ``None`` where it is alone and needs none.

        Raises:
            ParallelConfigError: The lists overlap or name ranks that the world does not have.
            ParallelError: torch's default process group has not been initialised.
            CommunicationError: A rank died or did not come within the timeout.
        """
        lists = rank_lists(group_ranks)
        if all(len(ranks) == 1 for ranks in lists):
            return None
        key = (variant, tuple(sorted(tuple(sorted(ranks)) for ranks in lists)))
        if key not in self._lists:
            self._lists[key] = self._make(lists, variant)
        return self._lists[key]

    def _make(self, lists: RankLists, variant: str) -> ProcessGroups | None:
        rank = _rank_in(lists)
        mine: ProcessGroups | None = None
        for unsorted in lists:
            ranks = tuple(sorted(unsorted))
            if len(ranks) == 1:
                continue
            if (variant, ranks) not in self._by_ranks:
                self._by_ranks[variant, ranks] = self._new(ranks, member=rank in ranks)
            if rank in ranks:
                mine = self._by_ranks[variant, ranks]
        if mine is not None:
            # A member that goes on, and perhaps destroys the group, while another is still
            # connecting would break the connection.
            self._run(mine.ranks, lambda: dist.barrier(group=mine.cpu))
        return mine

    def _new(self, ranks: tuple[int, ...], *, member: bool) -> ProcessGroups | None:
        device = self._new_group(ranks, self.backend, member=member)
        cpu = device
        if not serves_cpu(self.backend):
            cpu = self._new_group(ranks, CPU_BACKEND, member=member)
        return ProcessGroups(ranks, device, cpu) if device and cpu else None

    def _new_group(
        self, ranks: tuple[int, ...], backend: str, *, member: bool
    ) -> ProcessGroup | None:
        group = self._run(
            ranks, lambda: dist.new_group(list(ranks), timeout=self.timeout, backend=backend)
        )
        if not member or not isinstance(group, ProcessGroup):
            return None
        self._made.append(group)
        self._world = dist.group.WORLD
        return group

    def _run(self, ranks: tuple[int, ...], call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            msg = (
                f"the {self.backend} group of ranks {', '.join(map(str, ranks))} could not be made "
                f"within {self.timeout.total_seconds():g} s: {reason}\nA rank died, or does not "
                "make the same groups in the same order"
            )
            raise CommunicationError(
                msg, group="new", ranks=ranks, operation="new_group"
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
