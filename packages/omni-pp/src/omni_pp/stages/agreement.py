"""Ranks that are given the same configuration."""

from __future__ import annotations

from omni_group_coordinator import GroupCoordinator, RankMismatchError


def agree_on(group: GroupCoordinator, config: object, who: str = "stage") -> None:
    """Compare a configuration over the stages, or over other ranks.

    Args:
        group: The ranks.
        config: What this one was given.
        who: What a rank of the group is called.

    Raises:
        RankMismatchError: On every rank: it differs on one.
    """
    first, *others = group.all_gather_object(repr(config))
    for index, other in enumerate(others, start=1):
        if other != first:
            msg = f"{who} {index} was given another configuration than {who} 0: {other}, {first}"
            raise RankMismatchError(msg)
