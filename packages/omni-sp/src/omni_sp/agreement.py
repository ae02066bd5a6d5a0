"""Agreement of the ranks, in the first call of a model, that all of them will communicate."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from omni_group_coordinator import GroupCoordinator, ParallelError

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
            f"{where}: another rank refused this call, and says why; on this rank, whose part has "
            "another length, nothing looked wrong"
        )
        raise ParallelError(msg)
    return result


def _on_all(group: GroupCoordinator, fits: bool) -> bool:
    # A CPU tensor, whose value can be read without waiting for a device.
    flag = torch.tensor([fits], dtype=torch.int32, device="cpu")
    return bool(group.all_reduce(flag, dist.ReduceOp.MIN).item())
