"""Splitting a tensor over the sequence-parallel ranks, and joining it again."""

from __future__ import annotations

from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, split_sizes
from omni_parallel_state import ParallelState, get_parallel_state


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
    return shard(tensor, dim, group)


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
    return gather(tensor, dim, group, own * group.world_size if length is None else length)


def _length(tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = (
            f"dim={dim} does not exist in a tensor of shape {tuple(tensor.shape)}; "
            f"legal here: {-tensor.ndim} to {tensor.ndim - 1}"
        )
        raise ParallelConfigError(msg)
    return tensor.shape[dim]


def shard(tensor: Tensor, dim: int, group: GroupCoordinator) -> Tensor:
    """This rank's balanced shard over a group; the tensor itself for a group of one rank."""
    if group.world_size == 1:
        return tensor
    lengths = split_sizes(tensor.shape[dim], group.world_size)
    start = sum(lengths[: group.rank_in_group])
    return tensor.narrow(dim, start, lengths[group.rank_in_group])


def gather(tensor: Tensor, dim: int, group: GroupCoordinator, length: int) -> Tensor:
    """The whole tensor of this length, of which each rank of the group holds its shard."""
    whole = group.all_gather(tensor, dim, lengths=split_sizes(length, group.world_size))
    if not isinstance(whole, Tensor):
        msg = "all_gather without separate_tensors returned a list"
        raise TypeError(msg)
    return whole
