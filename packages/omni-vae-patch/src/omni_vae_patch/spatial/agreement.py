"""What the ranks agree on before any of them counts on the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from omni_group_coordinator import (
    CommunicationError,
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)

T = TypeVar("T")


def agreed(group: GroupCoordinator, what: str, work: Callable[[], T], same: Any = None) -> T:
    """What some work on this rank gives, once it has failed on none.

    Args:
        group: The ranks; all of them make this call, and nothing in the work communicates.
        what: What it is, for messages.
        work: Done on this rank.
        same: Gives plain data about the result that must be equal on all ranks.

    Raises:
        ParallelError: It failed on another rank: of the kinds of `ParallelConfigError` and
            out of memory where it was of these. On this rank: its own error.
        RankMismatchError: On every rank: what must be equal is not.
    """
    result, error, data = None, None, None
    try:
        result = work()
        data = None if same is None else same(result)
    except CommunicationError:
        raise  # the group is gone
    except Exception as found:
        error = found
    said = group.all_gather_object([report_of(error), data])
    if error is not None:
        raise error
    for rank, (report, _) in enumerate(said):
        if report is not None:
            raise_report(what, group.ranks[rank], report)
    if any(other != data for _, other in said):
        lines = "\n".join(f"  rank {group.ranks[r]}: {other}" for r, (_, other) in enumerate(said))
        msg = f"{what}: the ranks of a group were asked for different things:\n{lines}"
        raise RankMismatchError(msg)
    return result  # type: ignore[return-value]


def report_of(error: Exception | None) -> list[str] | None:
    """An error in words, for the other ranks."""
    if error is None:
        return None
    kind = "config" if isinstance(error, ParallelConfigError) else ""
    kind = "memory" if isinstance(error, torch.OutOfMemoryError) else kind
    return [kind, f"{type(error).__name__}: {error}"]


def raise_report(what: str, rank: int, report: list[str]) -> None:
    """Raise what another rank has reported."""
    kind, text = report
    msg = f"{what} failed on rank {rank}: {text}"
    if kind == "memory":
        raise torch.OutOfMemoryError(msg)
    raise ParallelConfigError(msg) if kind == "config" else ParallelError(msg)
