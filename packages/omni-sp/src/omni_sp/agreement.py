"""Agreement of the ranks, in the first call of a model, that all of them will communicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from omni_group_coordinator import CommunicationError, GroupCoordinator, ParallelError

P = ParamSpec("P")
T = TypeVar("T")


def agreed(
    group: GroupCoordinator, where: str, check: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """What a check returns, once it has raised on no rank.

    Parts of a sequence differ in length, so what one rank refuses may look right to another,
    which would then wait for it until its timeout.

    Args:
        group: The ranks; all of them make this call.
        where: What is checked, for messages.
        check: Raises where this rank cannot go on.
        args: Of the check.
        kwargs: Of the check.

    Raises:
        ParallelError: Another rank refused; that rank raises what its check raised.
    """
    try:
        result = check(*args, **kwargs)
    except Exception:
        _on_all(group, False)
        raise
    if not _on_all(group, True):
        msg = (
            f"{where}: another rank refused this call, or failed before it, and says why; on this "
            "rank, whose part has another length, nothing looked wrong"
        )
        raise ParallelError(msg)
    return result


@contextmanager
def until_all_are_through(group: GroupCoordinator, told: Callable[[], bool]) -> Iterator[None]:
    """Tell the others if what is done within fails on this rank, by whatever error.

    They learn of it where they agree next: before their next attention or gather, or at the end of
    this block.

    Args:
        group: The ranks; all of them enter the block.
        told: Whether an error within is one that all ranks know of.

    Raises:
        ParallelError: It failed on another rank, which raises its own error.
    """
    try:
        yield
    except CommunicationError:
        raise  # the group is gone
    except Exception:
        if not told():
            _on_all(group, False)
        raise
    if not _on_all(group, True):
        msg = (
            "the model failed on another rank, which says why: its code may expect a length that "
            "the part of a sequence does not have; unit= in the plan keeps tokens together"
        )
        raise ParallelError(msg)


def _on_all(group: GroupCoordinator, fits: bool) -> bool:
    # A CPU tensor, whose value can be read without waiting for a device.
    flag = torch.tensor([fits], dtype=torch.int32, device="cpu")
    return bool(group.all_reduce(flag, dist.ReduceOp.MIN).item())
