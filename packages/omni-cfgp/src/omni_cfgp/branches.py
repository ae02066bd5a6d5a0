"""Which rank computes which guidance branch. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence

from omni_group_coordinator import ParallelConfigError


def assign_branches(costs: Sequence[float], ranks: int) -> tuple[int, ...]:
    """The rank of each branch: the costliest first, each to the rank with the least to do so far.

    The largest sum of a rank is at most 4/3 of the best possible one (Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969).

    Args:
        costs: Of each branch, in any unit.
        ranks: Number of ranks; those beyond the number of branches get none.

    Raises:
        ParallelConfigError: There is no rank, or a cost is negative.
    """
    if ranks < 1 or any(cost < 0 for cost in costs):
        msg = f"cannot divide branches of costs {list(costs)} over {ranks} ranks; legal: 1 or more"
        raise ParallelConfigError(msg)
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = least_loaded(loads)
        loads[owners[index]] += costs[index]
    return tuple(owners)


def least_loaded(loads: Sequence[float]) -> int:
    """The first of the ranks that have the least to do."""
    return min(range(len(loads)), key=loads.__getitem__)
