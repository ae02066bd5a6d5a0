"""Which ranks a group has, where this rank stands in it, and the torch groups behind it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Self, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import Backend, ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.errors import ParallelConfigError, ParallelError
from omni_group_coordinator.process_groups import ProcessGroupPool, ProcessGroups, rank_lists
from omni_group_coordinator.utils import check_timeout, get_local_device


class GroupOptions(TypedDict, total=False):
    """Keyword arguments of every coordinator; see `GroupMembership`."""

    name: str
    timeout: timedelta | None
    debug: bool | None
    device: torch.device | None
    pool: ProcessGroupPool | None


class GroupMembership:
    """One group of ranks, seen from one of them.

    ``src`` and ``dst`` are group ranks everywhere: positions in `ranks`. A group of one rank has
    no process group; everything is then the identity and costs nothing. Call the constructor on
    every rank of the world, with the same lists.

    Args:
        group_ranks: One list of global ranks for each group of the dimension; this rank belongs
            to exactly one. A group's order is ascending rank order.
        local_rank: Index of this rank's device on its host.
        torch_distributed_backend: Backend for tensors on the device (``"nccl"``, ``"gloo"``, ...).
        name: Word for the group in messages.
        timeout: How long an operation may wait for its peers; default: 10 minutes. With a pool,
            the pool's holds.
        debug: Compare operation, shape and dtype over the ranks before each collective, and raise
            on every rank where they differ. Default: the variable ``OMNI_PARALLEL_DEBUG``. Off
            inside regions that torch.compile has traced.
        device: Where received tensors land; default: the CPU for gloo, else the accelerator
            with the index ``local_rank``.
        pool: Makes and owns the process groups, so that dimensions over the same ranks share
            them; default: a pool of its own, which `destroy` empties.

    Attributes:
        rank: Global rank of this process.
        ranks: Global ranks of this process's group, ascending.
        world_size: Number of ranks of the group.
        local_rank: As given.
        rank_in_group: Position of this rank in `ranks`.
        device: Where received tensors land.
        name: As given.
        device_group: torch group for tensors on the device; ``None`` for one rank.
        cpu_group: torch group for CPU tensors; ``None`` for one rank.

    Raises:
        ParallelConfigError: The lists overlap, are empty, or do not hold this rank.
        ParallelError: A group of several ranks, and torch's default group is missing.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str | Backend,
        *,
        name: str = "group",
        timeout: timedelta | None = None,
        debug: bool | None = None,
        device: torch.device | None = None,
        pool: ProcessGroupPool | None = None,
    ) -> None:
        lists = rank_lists(group_ranks)
        rank = dist.get_rank() if dist.is_initialized() else lists[0][0]
        mine = next((sorted(ranks) for ranks in lists if rank in ranks), None)
        if mine is None:
            msg = (
                f"rank {rank} is in none of the groups {[list(r) for r in lists]} of {name!r}; "
                f"every rank belongs to one: add [{rank}] for a rank that stands alone"
            )
            raise ParallelConfigError(msg)
        self._pool = None
        backend = str(torch_distributed_backend)
        device = device or _device_for(backend, local_rank)
        if pool is None:
            pool = self._pool = ProcessGroupPool(backend, timeout=timeout, device=device)
        self._set(mine, rank, name, device)
        self.local_rank = local_rank
        self._attach(pool.groups_for(lists, name=name), pool.timeout, debug)

    @classmethod
    def from_process_group(
        cls,
        group: ProcessGroup,
        *,
        cpu_group: ProcessGroup | None = None,
        name: str = "group",
        timeout: timedelta | None = None,
        debug: bool | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """Wrap a group that the caller made, and keeps: `destroy` leaves it alone.

        Args:
            group: Of any number of ranks, this one among them.
            cpu_group: A gloo group over the same ranks, for metadata and barriers; default:
                ``group`` itself, which must then move CPU tensors for these to work.
            name: Word for the group in messages.
            timeout: What the group was made with, for messages.
            debug: As in the constructor.
            device: As in the constructor.

        Raises:
            ParallelConfigError: This rank is no member of the group, or an impossible timeout.
        """
        if timeout is not None:
            check_timeout(timeout)
        if not isinstance(group, ProcessGroup):
            msg = (
                f"from_process_group got {group!r}, which is what torch.distributed.new_group "
                "gives a rank that is not in the group; wrap a group on its own ranks only"
            )
            raise ParallelConfigError(msg)
        ranks = dist.get_process_group_ranks(group)
        self = cls.__new__(cls)
        self._pool = None
        local = get_local_device().index or 0
        device = device or _device_for(str(dist.get_backend(group)), local)
        self._set(ranks, dist.get_rank(), name, device)
        self.local_rank = device.index or 0
        groups = ProcessGroups(tuple(ranks), group, cpu_group or group)
        self._attach(groups if len(ranks) > 1 else None, timeout, debug)
        return self

    @classmethod
    def from_device_mesh(
        cls,
        mesh: DeviceMesh,
        dim: str | int,
        *,
        cpu_group: ProcessGroup | None = None,
        name: str | None = None,
        timeout: timedelta | None = None,
        debug: bool | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """Wrap this rank's group of one dimension of a mesh that the caller made.

        Args:
            mesh: The mesh; this rank belongs to it.
            dim: Name or index of the dimension.
            cpu_group: As in `from_process_group`.
            name: Word for the group in messages; default: the dimension's.
            timeout: As in `from_process_group`.
            debug: As in the constructor.
            device: As in the constructor.

        Raises:
            ParallelConfigError: This rank is not in the mesh, or an impossible timeout.
        """
        if mesh.get_coordinate() is None:
            msg = f"rank {dist.get_rank()} is not in the mesh {mesh}; use it on its ranks only"
            raise ParallelConfigError(msg)
        return cls.from_process_group(
            mesh.get_group(dim),
            cpu_group=cpu_group,
            name=name or f"mesh {dim}",
            timeout=timeout,
            debug=debug,
            device=device,
        )

    def _set(self, ranks: Sequence[int], rank: int, name: str, device: torch.device) -> None:
        self.name = name
        self.rank = rank
        self.ranks = list(ranks)
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(rank)
        self.device = device

    def _attach(
        self, groups: ProcessGroups | None, timeout: timedelta | None, debug: bool | None
    ) -> None:
        self._checked: CheckedGroup | None = None
        if groups is not None:
            self._checked = CheckedGroup(groups, name=self.name, timeout=timeout, debug=debug)

    @property
    def checked(self) -> CheckedGroup | None:
        """Where this group's operations are posted; ``None`` for one rank.

        Raises:
            ParallelError: The group was destroyed.
        """
        if self._checked is None and self.world_size > 1:
            msg = f"group {self.name!r} of ranks {self.ranks} was destroyed; build a new one"
            raise ParallelError(msg)
        return self._checked

    @property
    def device_group(self) -> ProcessGroup | None:
        """Torch group for tensors on the device; ``None`` for one rank."""
        return None if self._checked is None else self._checked.group

    @property
    def cpu_group(self) -> ProcessGroup | None:
        """Torch group for CPU tensors; ``None`` for one rank."""
        return None if self._checked is None else self._checked.cpu_group

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, ranks={self.ranks}, rank={self.rank})"

    # -- neighbours ------------------------------------------------------------------------

    @property
    def first_rank(self) -> int:
        """Global rank of the first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the last member."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the first member."""
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank is the last member."""
        return self.rank_in_group == self.world_size - 1

    @property
    def group_next_rank(self) -> int:
        """Group rank of the next member; the last one's is the first."""
        return (self.rank_in_group + 1) % self.world_size

    @property
    def group_prev_rank(self) -> int:
        """Group rank of the previous member; the first one's is the last."""
        return (self.rank_in_group - 1) % self.world_size

    @property
    def next_rank(self) -> int:
        """Global rank of the next member."""
        return self.ranks[self.group_next_rank]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous member."""
        return self.ranks[self.group_prev_rank]

    @property
    def group_skip_rank(self) -> int:
        """Group rank of the mirror member, for U-shaped skip connections."""
        return self.world_size - 1 - self.rank_in_group

    @property
    def skip_rank(self) -> int:
        """Global rank of the mirror member."""
        return self.ranks[self.group_skip_rank]

    def destroy(self) -> None:
        """Give up the group; a second call does nothing.

        Process groups that this object made are destroyed; those of a pool or of the caller stay.
        """
        self._checked = None
        if self._pool is not None:
            self._pool.destroy()


def _device_for(backend: str, local_rank: int) -> torch.device:
    """Where a backend's tensors live: plain gloo serves the CPU, the others an accelerator."""
    return torch.device("cpu") if backend == "gloo" else get_local_device(local_rank)
