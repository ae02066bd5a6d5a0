"""Masks over a split sequence: from what the caller has to what a block of attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_sp.attention.heads import HeadShare
from omni_sp.shards import Run, SequenceShards


@dataclass(frozen=True)
class SequenceMask:
    """A mask over the whole sequence.

    The keys are all of it, in natural order; the queries are all of it too, or this rank's own
    (``rows_are_local``), or one row for all.
    """

    tensor: Tensor
    """``(batch or 1, heads or 1, queries or 1, keys)``: boolean, true attends; or a bias."""
    rows_are_local: bool = False
    """The queries are those of this rank, in local order."""

    def block(self, rows: Sequence[Run], columns: Sequence[Run], share: HeadShare | None) -> Tensor:
        """The part for some queries, keys and heads.

        Args:
            rows: Queries, by their runs in the whole sequence; not read if rows are local.
            columns: Keys, by their runs in the whole sequence.
            share: The heads; ``None``: all.
        """
        mask = self.tensor
        if share is not None and mask.shape[1] > 1:
            mask = mask[:, share.start : share.stop]
        if mask.shape[2] > 1 and not self.rows_are_local:
            mask = _selected(mask, rows, 2)
        return _selected(mask, columns, 3)


def _selected(tensor: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    parts = [tensor.narrow(dim, run.start, run.length) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def checked_mask(
    mask: Tensor, shape: tuple[int, int], rows: SequenceShards, columns: SequenceShards, rank: int
) -> Tensor:
    """A mask with four dimensions, of sizes that fit.

    Args:
        mask: Whatever broadcasts to ``(batch, heads, queries, keys)``; queries and keys may be
            counted over the whole sequence or over this rank's part.
        shape: Batch and heads.
        rows: How the queries lie on the ranks.
        columns: How the keys lie on the ranks.
        rank: This rank.

    Raises:
        ParallelConfigError: It does not fit; names what would.
    """
    full = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
    legal = (
        {1, shape[0]},
        {1, shape[1]},
        {1, rows.length, rows.local_length(rank)},
        {columns.length, columns.local_length(rank)},
    )
    if full.ndim != 4 or any(n not in sizes for n, sizes in zip(full.shape, legal, strict=True)):
        named = ", ".join(
            f"{dim} {' or '.join(map(str, sorted(sizes)))}"
            for dim, sizes in zip(("batch", "heads", "queries", "keys"), legal, strict=True)
        )
        msg = (
            f"an attention mask of shape {tuple(mask.shape)} does not fit; legal sizes here: "
            f"{named} (of the whole sequence, or of this rank's part)"
        )
        raise ParallelConfigError(msg)
    local_rows = full.shape[2] not in (1, rows.length)
    if local_rows and full.shape[3] != columns.length:
        msg = (
            f"an attention mask of shape {tuple(mask.shape)} has the queries and the keys of this "
            "rank alone, so it says nothing of the other ranks' keys; legal: all "
            f"{columns.length} keys, or one row for all queries"
        )
        raise ParallelConfigError(msg)
    if not (full.dtype is torch.bool or full.dtype.is_floating_point):
        msg = (
            f"an attention mask of dtype {str(full.dtype).removeprefix('torch.')}; legal: bool "
            "(true attends) or a floating-point bias"
        )
        raise ParallelConfigError(msg)
    return full


def whole_mask(
    mask: Tensor,
    rows: SequenceShards,
    columns: SequenceShards,
    group: GroupCoordinator,
    dense: bool,
) -> SequenceMask:
    """A checked mask with all the keys, which takes a gather if it had this rank's only.

    Args:
        mask: As `checked_mask` returns it.
        rows: How the queries lie on the ranks.
        columns: How the keys lie on the ranks.
        group: All the ranks.
        dense: Queries leave their rank (Ulysses), so the rows of all must be known to all.
    """
    rank = group.rank_in_group
    if mask.shape[3] != columns.length:
        mask = _gathered(mask, columns, group, 3)
    local = mask.shape[2] > 1 and mask.shape[2] != rows.length
    if local and dense:
        mask, local = _gathered(mask, rows, group, 2), False
    if local and not rows.plain:
        sharded, replicated = rows.strip(mask, rank, 2)
        mask = sharded if replicated is None else torch.cat([sharded, replicated], 2)
    return SequenceMask(mask, local)


def _gathered(mask: Tensor, shards: SequenceShards, group: GroupCoordinator, dim: int) -> Tensor:
    """All of a mask of which each rank has its part along a dimension, in natural order."""
    mine, shared = shards.strip(mask, group.rank_in_group, dim)
    lengths = [shards.sharded_length(rank) for rank in range(group.world_size)]
    joined = group.all_gather(mine, dim, lengths=lengths)
    parts = [joined] if shared is None else [joined, shared]
    runs = [run for rank in range(group.world_size) for run in shards.runs(rank)]
    runs += shards.replicated_runs()
    return in_natural_order(torch.cat(parts, dim), runs, dim)


def in_natural_order(tensor: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """A tensor whose tokens stand in the order of ``runs``, put in that of their positions."""
    if list(runs) == sorted(runs):
        return tensor
    at = dict(zip(runs, _starts(runs), strict=True))
    return torch.cat([tensor.narrow(dim, at[run], run.length) for run in sorted(runs)], dim)


def in_order_of(tensor: Tensor, runs: Sequence[Run], dim: int) -> Tensor:
    """The inverse of `in_natural_order`, for runs that cover the whole sequence."""
    if list(runs) == sorted(runs):
        return tensor
    return torch.cat([tensor.narrow(dim, run.start, run.length) for run in runs], dim)


def _starts(runs: Sequence[Run]) -> list[int]:
    starts, at = [], 0
    for run in runs:
        starts.append(at)
        at += run.length
    return starts
