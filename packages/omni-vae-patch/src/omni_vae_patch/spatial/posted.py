"""Rows of the neighbours that are under way while a rank computes what needs none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, wait_all

Halo = tuple[Tensor, Tensor]


def post_halo(
    group: GroupCoordinator, x: Tensor, dim: int, rows: tuple[int, int], wanted: tuple[int, int]
) -> Callable[[], Halo] | None:
    """Send what the neighbours want of a shard, and receive what this rank wants, in a while.

    The same messages as of `omni_group_coordinator.halo_exchange`, of which ranks may take one and
    others the other.

    Args:
        group: The ranks.
        x: This rank's shard. No rank with rows has fewer than any wants.
        dim: Of the shard, from the end.
        rows: Rows that this rank gets before and after its own: none at a border of the whole.
        wanted: Rows that each rank wants before and after its own.

    Returns:
        Waits for the rows and gives them; ``None`` where the group compares each call first.
    """
    checked = group.checked
    if checked is None or checked.debug:
        return None
    before, after = rows
    me, length = checked.rank, x.shape[dim]
    found = (_empty(x, dim, before), _empty(x, dim, after))
    sends: list[tuple[Tensor, int]] = []
    # Who gets rows on one side has a neighbour there, who wants those of the other side.
    if before:
        sends.append((_rows(x, dim, 0, wanted[1]), me - 1))
    if after:
        sends.append((_rows(x, dim, length - wanted[0], wanted[0]), me + 1))
    receives = [(found[0], me - 1), (found[1], me + 1)]
    works = checked.iexchange(sends, receives, "halo")

    def wait() -> Halo:
        wait_all(works)
        return found

    return wait


def can_post(lengths: Sequence[int], before: int, after: int) -> bool:
    """Whether all rows that are wanted are those of the next rank, on both sides or on none."""
    least = min(length for length in lengths if length)
    return before > 0 and after > 0 and max(before, after) <= least


def _rows(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length).contiguous()


def _empty(x: Tensor, dim: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length
    return torch.empty(shape, dtype=x.dtype, device=x.device)
