"""Splitting a tensor over the sequence-parallel ranks, and joining it again."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_parallel_state import ParallelState, get_parallel_state
from omni_sp.joining import gather_pieces
from omni_sp.shards import Segment, padded_run, piece_of, shard_runs


def sp_shard(
    tensor: Tensor, dim: int, validate: bool = True, *, state: ParallelState | None = None
) -> Tensor:
    """This rank's shard of a tensor that every rank holds.

    Args:
        tensor: The whole tensor.
        dim: Dimension to split.
        validate: Raise if the length does not divide over the ranks. Without it the shards are
            balanced: their lengths differ by at most one, and some are empty where the tensor is
            shorter than the group. `sp_gather` must then be told the whole length.
        state: The ranks; default: the current state.

    Returns:
        A view of the tensor; the tensor itself for a group of one rank.

    Raises:
        ParallelConfigError: ``validate``, and the length does not divide; or no such dimension.
        RuntimeError: No state was given and none is current.
    """
    group = (get_parallel_state() if state is None else state).sp
    length = _length(tensor, dim)
    if validate and length % group.world_size:
        low = length - length % group.world_size
        msg = (
            f"length {length} of dimension {dim} cannot be split evenly over "
            f"{group.world_size} ranks; nearest lengths that can: {low} and "
            f"{low + group.world_size}; or pass validate=False here and length= to sp_gather"
        )
        raise ParallelConfigError(msg)
    return _shard(tensor, dim, group, length)


def sp_gather(
    tensor: Tensor,
    dim: int,
    validate: bool = True,
    *,
    length: int | None = None,
    state: ParallelState | None = None,
) -> Tensor:
    """The whole tensor, of which each rank holds its shard; the inverse of `sp_shard`.

    Args:
        tensor: This rank's shard.
        dim: Dimension that was split.
        validate: As it was passed to `sp_shard`: without it shards may differ, and ``length`` is
            needed, since no rank asks another for the size of its shard.
        length: Length of the whole; default: as many times this shard as there are ranks, which
            is right after an even split only.
        state: The ranks; default: the current state.

    Raises:
        ParallelConfigError: The shard is not the one that ``length`` gives this rank, or the
            length is needed and missing.
        RuntimeError: No state was given and none is current.
    """
    group = (get_parallel_state() if state is None else state).sp
    own = _length(tensor, dim)
    if length is None and not validate:
        msg = "sp_gather(validate=False) joins shards that may differ: pass length= of the whole"
        raise ParallelConfigError(msg)
    whole = own * group.world_size if length is None else length
    segment = Segment(whole)
    expected = piece_of(segment, group.world_size, group.rank_in_group).tokens
    if own != expected:
        msg = (
            f"group rank {group.rank_in_group} has a shard of shape {tuple(tensor.shape)}, of "
            f"length {own} along dimension {dim}; of a whole of length {whole} it holds {expected}"
        )
        raise ParallelConfigError(msg)
    return gather_pieces(tensor, dim, segment, group, "contiguous")


def sp_shard_with_padding(
    tensor: Tensor, dim: int, pad_value: float = 0.0, *, state: ParallelState | None = None
) -> tuple[Tensor, int]:
    """This rank's shard of a tensor that is padded at its end until it divides over the ranks.

    Padding is an option for code that wants equal shards, never a need: ``sp_shard`` splits any
    length. To undo it, gather and cut along the same dimension::

        shard, padding = sp_shard_with_padding(tensor, dim)
        whole = sp_gather(shard, dim).narrow(dim, 0, tensor.shape[dim])

    Args:
        tensor: The whole tensor.
        dim: Dimension to split.
        pad_value: What fills the padding, as a value of the tensor's dtype.
        state: The ranks; default: the current state.

    Returns:
        The shard, and how many tokens were added to the whole: they are the last ones, and may
        lie on more than one rank.

    Raises:
        ParallelConfigError: No such dimension.
        RuntimeError: No state was given and none is current.
    """
    group = (get_parallel_state() if state is None else state).sp
    length, size = _length(tensor, dim), group.world_size
    dim %= tensor.ndim
    padding = -length % size
    run, missing = padded_run(length, size, group.rank_in_group)
    shard = tensor.narrow(dim, run.start, run.length)
    if missing:
        shape = (*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])
        shard = torch.cat([shard, tensor.new_full(shape, pad_value)], dim)
    return shard, padding


def _length(tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = (
            f"dim={dim} does not exist in a tensor of shape {tuple(tensor.shape)}; "
            f"legal here: {-tensor.ndim} to {tensor.ndim - 1}"
        )
        raise ParallelConfigError(msg)
    return tensor.shape[dim]


def _shard(tensor: Tensor, dim: int, group: GroupCoordinator, length: int) -> Tensor:
    if group.world_size == 1:
        return tensor
    (run,) = shard_runs(length, group.world_size, group.rank_in_group)
    return tensor.narrow(dim, run.start, run.length)
