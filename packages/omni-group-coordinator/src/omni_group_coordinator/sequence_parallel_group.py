"""`SequenceParallelGroupCoordinator`: a group that knows its Ulysses and Ring sub-groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Unpack

from torch.distributed import Backend, ProcessGroup

from omni_group_coordinator.coordinator import GroupCoordinator
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.membership import GroupOptions
from omni_group_coordinator.process_groups import ProcessGroups


class SequenceParallelGroupCoordinator(GroupCoordinator):
    """The ranks among which a sequence is split, and how attention divides its work over them.

    ``rank_in_group = ring_rank * ulysses_world_size + ulysses_rank``: a Ulysses group holds a
    contiguous run of the sequence, a Ring group one shard of each run. Made from a process group
    or a mesh, all its ranks are one Ulysses group.

    Args:
        group_ranks: As in `GroupMembership`.
        local_rank: As in `GroupMembership`.
        torch_distributed_backend: As in `GroupMembership`.
        ulysses_group: Sub-group for all-to-all attention; ``None``: of one rank.
        ring_group: Sub-group for ring attention; ``None``: of one rank.
        **options: As in `GroupMembership`.

    Attributes:
        ulysses_world_size: Ranks of the Ulysses group.
        ulysses_rank: This rank's position in it.
        ring_world_size: Ranks of the Ring group.
        ring_rank: This rank's position in it.

    Raises:
        ParallelConfigError: The sub-groups do not multiply to this group, or lie otherwise.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str | Backend,
        *,
        ulysses_group: GroupCoordinator | ProcessGroup | None = None,
        ring_group: GroupCoordinator | ProcessGroup | None = None,
        **options: Unpack[GroupOptions],
    ) -> None:
        options.setdefault("name", "sp")
        super().__init__(group_ranks, local_rank, torch_distributed_backend, **options)
        self.ulysses: GroupCoordinator | None = _as_coordinator(ulysses_group, "ulysses")
        self.ring: GroupCoordinator | None = _as_coordinator(ring_group, "ring")
        self.ulysses_world_size, self.ulysses_rank = _place(self.ulysses)
        self.ring_world_size, self.ring_rank = _place(self.ring)
        try:
            self._check()
        except ParallelConfigError:
            self.destroy()
            raise

    def _attach(
        self, groups: ProcessGroups | None, timeout: timedelta | None, debug: bool | None
    ) -> None:
        super()._attach(groups, timeout, debug)
        self.ulysses = self if groups is not None else None
        self.ring = None
        self.ulysses_world_size, self.ulysses_rank = self.world_size, self.rank_in_group
        self.ring_world_size, self.ring_rank = 1, 0

    @property
    def ulysses_group(self) -> ProcessGroup | None:
        """Torch group of the Ulysses ranks; ``None`` for one rank."""
        return None if self.ulysses is None else self.ulysses.device_group

    @property
    def ring_group(self) -> ProcessGroup | None:
        """Torch group of the Ring ranks; ``None`` for one rank."""
        return None if self.ring is None else self.ring.device_group

    def _check(self) -> None:
        run = self.ulysses_world_size
        start = self.rank_in_group - self.rank_in_group % run
        ulysses = self.ranks[start : start + run]
        ring = self.ranks[self.rank_in_group % run :: run]
        members = (_members(self.ulysses, self.rank), _members(self.ring, self.rank))
        if self.world_size % run or members != (ulysses, ring):
            msg = (
                f"sequence-parallel group {self.ranks}, rank {self.rank}: the Ulysses group "
                f"{_ranks(self.ulysses)} and the Ring group {_ranks(self.ring)} do not divide it; "
                f"a Ulysses group is a contiguous run of it (here {ulysses}), "
                "a Ring group takes one rank of each run, and the sizes multiply to "
                f"{self.world_size}"
            )
            raise ParallelConfigError(msg)


def _as_coordinator(
    group: GroupCoordinator | ProcessGroup | None, name: str
) -> GroupCoordinator | None:
    if group is None or isinstance(group, GroupCoordinator):
        return group
    return GroupCoordinator.from_process_group(group, name=name)


def _place(group: GroupCoordinator | None) -> tuple[int, int]:
    return (1, 0) if group is None else (group.world_size, group.rank_in_group)


def _members(group: GroupCoordinator | None, rank: int) -> list[int]:
    return [rank] if group is None else group.ranks


def _ranks(group: GroupCoordinator | None) -> list[int] | str:
    return "of one rank" if group is None else group.ranks
