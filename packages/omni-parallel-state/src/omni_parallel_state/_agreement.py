"""The ranks compare what they ask for, before one waits in a group that others never make."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from omni_group_coordinator import CommunicationError, ParallelConfigError
from omni_group_coordinator.agreement import differences, pack, unpack
from omni_group_coordinator.errors import reason_of
from omni_group_coordinator.process_groups import serves_cpu


def agree_over_world(text: str, device: torch.device, timeout: timedelta) -> None:
    """Compare a text over the ranks of torch's default group: one small collective.

    Does nothing without a default group of several ranks, or where the group is simulated.

    Args:
        text: What must be the same on every rank.
        device: Where the default group moves tensors, if it moves none of the CPU.
        timeout: How long to wait for the other ranks.

    Raises:
        ParallelConfigError: On every rank alike, naming which ranks ask for what.
        CommunicationError: A rank died or did not come.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    backend = str(dist.get_backend())
    if backend == "fake":
        return
    # "undefined" is what torch says of a default group with a backend for each device type.
    on_cpu = serves_cpu(backend) or backend == "undefined"
    mine = pack(text).to("cpu" if on_cpu else device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    ranks = range(len(rows))
    try:
        work = dist.all_gather(rows, mine, async_op=True)
        if work is not None:
            work.wait(timeout)
        texts = [unpack(row) for row in rows]
    except RuntimeError as error:
        msg = (
            f"the ranks could not compare their layouts within {timeout.total_seconds():g} s: "
            f"{reason_of(error)}\nA rank died, or does not build a parallel state"
        )
        operation = "compare layouts"
        raise CommunicationError(msg, group="world", ranks=ranks, operation=operation) from error
    lines = differences(texts, ranks)
    if lines:
        msg = "the ranks do not ask for the same parallel state:\n" + "\n".join(lines)
        raise ParallelConfigError(msg)
