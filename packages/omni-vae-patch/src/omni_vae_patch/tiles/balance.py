"""Which rank does which piece of work."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_owners(workloads: Sequence[float], ranks: int) -> list[int]:
    """The rank of each piece: the longest first, always to the rank with the least to do.

    A pure function of its arguments, so that every rank finds the same. Pieces of the same
    length keep their order; with fewer pieces than ranks the last ranks have none.
    """
    owners = [0] * len(workloads)
    loads = [0.0] * ranks
    for index in sorted(range(len(workloads)), key=lambda index: (-workloads[index], index)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[index] = rank
        loads[rank] += workloads[index]
    return owners
