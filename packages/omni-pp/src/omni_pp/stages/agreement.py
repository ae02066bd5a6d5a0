"""Ranks that are given the same configuration."""

from __future__ import annotations

from omni_group_coordinator import GroupCoordinator, RankMismatchError


def agree_on(group: GroupCoordinator, config: object) -> None:
    """Compare a configuration over the stages.

    Raises:
        RankMismatchError: On every rank: it differs on one.
    """
    first, *others = group.all_gather_object(repr(config))
    for stage, other in enumerate(others, start=1):
        if other != first:
            msg = f"stage {stage} was given another configuration than stage 0: {other}, {first}"
            raise RankMismatchError(msg)
