"""Work that every rank does for itself, and that fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_group_coordinator.agreement import pack, unpack

ResultT = TypeVar("ResultT")


def together(group: GroupCoordinator | None, what: str, work: Callable[[], ResultT]) -> ResultT:
    """Do something, and raise if it failed on any rank: one small collective.

    Args:
        group: The ranks; None for one alone.
        what: The work in words, for the message.
        work: Does it, without communication.

    Raises:
        ParallelError: It failed on another rank; says how. This rank's own error is raised as
            it is.
    """
    if group is None:
        return work()
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    text = "" if error is None else f"{type(error).__name__}: {error}"
    rows = group.all_gather(pack(text).to(group.device), separate_tensors=True)
    if error is not None:
        raise error
    texts = [unpack(row.to("cpu")) for row in rows]
    failed = {rank: text for rank, text in zip(group.ranks, texts, strict=True) if text}
    if failed:
        rank, reason = next(iter(failed.items()))
        ranks = ", ".join(map(str, failed))
        msg = f"cannot {what}: rank {ranks} of {group.ranks} failed; rank {rank}: {reason}"
        raise ParallelError(msg)
    return result
