"""A barrier of a gloo group that names the ranks which did not come."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from omni_group_coordinator.errors import reason_of


def named_barrier(group: ProcessGroup, ranks: Sequence[int], timeout: timedelta | None) -> None:
    """Wait until every rank of the group is here.

    Args:
        group: A gloo group.
        ranks: The global rank of each group rank.
        timeout: How long to wait; ``None``: as long as the group waits for anything.

    Raises:
        RuntimeError: Names the missing ranks by their global ranks.
    """
    try:
        # The one operation of torch that names who is missing.
        dist.monitored_barrier(group, timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise RuntimeError(with_global_ranks(reason_of(error), ranks)) from error


def with_global_ranks(reason: str, ranks: Sequence[int]) -> str:
    """Say in global ranks what torch's monitored_barrier says in ranks of its group.

    There is nothing to read but the text, in which torch 2.13.0 has two forms. Group rank 0, to
    which all others report, raises ``[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 1000
    ms``, and the others raise ``Rank 2 successfully reached monitoredBarrier, but received errors
    while waiting for send/recv from rank 0. ...``. Another version may have others.
    """
    missing = re.search(r"Ranks? (\d+(?:, \d+)*) failed to pass monitoredBarrier in (.*)", reason)
    if missing:
        absent = [ranks[int(number)] for number in missing[1].split(", ")]
        noun = "rank" if len(absent) == 1 else "ranks"
        return f"{noun} {', '.join(map(str, absent))} did not come to the barrier in {missing[2]}"
    if re.match(r"Rank \d+ successfully reached monitoredBarrier", reason):
        return (
            f"rank {ranks[0]}, to which the others report, did not let this one pass: it did not "
            "come, or its own error names the ranks that did not"
        )
    return f"{reason} (group ranks; their global ranks are {', '.join(map(str, ranks))})"
