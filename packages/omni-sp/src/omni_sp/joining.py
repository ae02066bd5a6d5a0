"""The whole of what lies in pieces on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_sp.shards import Order, Segment, piece_of


def gather_pieces(
    tensor: Tensor, dim: int, segment: Segment, group: GroupCoordinator, order: Order
) -> Tensor:
    """The whole of a stream of which each rank holds its piece, in natural order."""
    pieces = [piece_of(segment, group.world_size, rank, order) for rank in range(group.world_size)]
    lengths = [sum(run.stop - run.start for run in piece.runs) for piece in pieces]
    mine = tensor.narrow(dim, 0, lengths[group.rank_in_group])
    whole = group.all_gather(mine, dim, lengths=lengths)
    if order == "contiguous":
        return whole
    runs = [run for piece in pieces for run in piece.runs]
    parts = dict(
        zip(
            [run.start for run in runs],
            torch.split(whole, [run.stop - run.start for run in runs], dim),
            strict=True,
        )
    )
    return torch.cat([parts[run.start] for run in sorted(runs) if run.stop > run.start], dim)


def check_dims(tensor: Tensor, dim: int, expected: int | None, where: str) -> None:
    """Check a tensor's number of dimensions against the plan.

    Raises:
        ParallelError: It is another one, or has no dimension ``dim``.
    """
    if expected is not None and tensor.ndim != expected:
        msg = f"{where}: expected {expected} dimensions; found shape {tuple(tensor.shape)}"
        raise ParallelError(msg)
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = f"{where}: expected a dimension {dim}; found shape {tuple(tensor.shape)}"
        raise ParallelError(msg)
