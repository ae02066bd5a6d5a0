"""One rank's failure as every rank's error, told before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist

from omni_group_coordinator import (
    CommunicationError,
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)

Plain = Any
"""``None``, numbers, texts, dtypes, lists, tuples and dicts of these."""

_READY, _ASKS, _FAILED = 0, 1, 2
_OTHER, _MEMORY, _CONFIG = 0, 1, 2
T = TypeVar("T")


class PeerOutOfMemoryError(ParallelError, torch.OutOfMemoryError):
    """Another rank ran out of memory, and no rank failed of anything else.

    An `OutOfMemoryError` on every rank, so that code which then tries something smaller does so
    on all of them.
    """


class PeerStoppedError(ParallelError):
    """Work that ranks do in step ended because of another rank, which will say why."""


@dataclass(frozen=True)
class Attempt:
    """What became of work that must not leave by an exception: peers would wait for this rank."""

    value: Any = None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Attempt:
        """Do the work and keep its value or its error; where the group is gone, nobody waits."""
        try:
            return cls(work())
        except CommunicationError:
            raise
        except Exception as error:
            return cls(error=error)


def settle(
    group: GroupCoordinator,
    what: str,
    attempt: Attempt,
    note: Plain = None,
    *,
    asks: bool = False,
    plan: str = "",
) -> list[Plain] | None:
    """Learn how the attempts of all ranks went: one all-reduce of three integers on the CPU.

    Args:
        group: The ranks.
        what: For messages: what was attempted.
        attempt: Of this rank.
        note: What this rank says if any rank asks; plain data.
        asks: Whether this rank needs the notes of the others.
        plan: What this rank takes for granted of the others; the same text on every rank.

    Returns:
        The notes in rank order if a rank asked, else ``None``. On every rank alike.

    Raises:
        Exception: This rank's attempt failed: its own error.
        PeerOutOfMemoryError: Other ranks ran out of memory, and nothing else went wrong.
        ParallelError: Another rank failed; the message names rank and error. It is a
            `ParallelConfigError` if that rank's was.
        RankMismatchError: The plans differ.
    """
    if attempt.error is None and group.world_size == 1:
        return [note] if asks else None
    if group.world_size > 1:
        code = _FAILED if attempt.error else _ASKS if asks else _READY
        mark = crc32(plan.encode())
        status = torch.tensor([code, mark, -mark])
        code, high, low = group.all_reduce(status, dist.ReduceOp.MAX).tolist()
        if code == _READY and high == -low:
            return None
        error = None if isinstance(attempt.error, PeerStoppedError) else attempt.error
        kind = _MEMORY if isinstance(error, torch.OutOfMemoryError) else _OTHER
        kind = _CONFIG if isinstance(error, ParallelConfigError) else kind
        report = None if error is None else f"{type(error).__name__}: {error}"
        said = group.all_gather_object([report, kind, plan, note])
        _check(group, what, attempt, said)
        return [rest[-1] for rest in said]
    if attempt.error is not None:
        raise attempt.error
    return None


def _check(group: GroupCoordinator, what: str, attempt: Attempt, said: Sequence[Plain]) -> None:
    if attempt.error is not None and not isinstance(attempt.error, PeerStoppedError):
        raise attempt.error
    failed = [(rank, text, kind) for rank, (text, kind, *_) in enumerate(said) if text]
    if failed:
        rank, text, kind = failed[0]
        msg = f"{what} failed on rank {group.ranks[rank]}: {text}"
        if all(kind == _MEMORY for *_, kind in failed):
            raise PeerOutOfMemoryError(msg)
        raise ParallelConfigError(msg) if kind == _CONFIG else ParallelError(msg)
    plans = [plan for _, _, plan, _ in said]
    if any(plan != plans[0] for plan in plans):
        lines = [f"  rank {group.ranks[rank]}: {plan}" for rank, plan in enumerate(plans)]
        msg = (
            f"{what} differs between the ranks of one group, which need the same input, settings "
            "and kind of autoencoder:\n" + "\n".join(lines)
        )
        raise RankMismatchError(msg)


def agreed(
    group: GroupCoordinator,
    what: str,
    work: Callable[[], T],
    same: Callable[[T], Plain] | None = None,
) -> T:
    """What some work on this rank gives, once it has failed on none.

    Args:
        group: The ranks; all of them make this call, and nothing in the work communicates.
        what: What it is, for messages.
        work: Done on this rank.
        same: Gives what of the result must be equal on all ranks.

    Raises:
        Exception: As of `settle`.
    """
    attempt = Attempt.of(work)
    plan = "" if same is None or attempt.error is not None else repr(same(attempt.value))
    settle(group, what, attempt, plan=plan)
    value: T = attempt.value
    return value
