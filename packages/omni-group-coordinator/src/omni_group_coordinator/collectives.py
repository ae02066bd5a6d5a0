"""Collectives on whole tensors: any dimension, any layout in memory, lengths that differ by rank.

Lengths are given by the caller, who knows them by arithmetic; no rank asks another for a size.
Everything here but `gather`, whose result one rank alone gets, traces under
``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from omni_group_coordinator import operators
from omni_group_coordinator.checked_group import CheckedGroup, wait_all
from omni_group_coordinator.errors import ParallelConfigError

_REDUCERS: dict[dist.ReduceOp.RedOpType, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    dist.ReduceOp.MAX: lambda stacked: stacked.amax(0),
    dist.ReduceOp.MIN: lambda stacked: stacked.amin(0),
    dist.ReduceOp.PRODUCT: lambda stacked: stacked.prod(0, dtype=stacked.dtype),
}


def all_reduce(
    group: CheckedGroup, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce over the ranks, in place; returns the tensor.

    Raises:
        ParallelConfigError: A dtype that backends only carry (float8, int16, ...).
    """
    group.check_reducible(tensor.dtype)
    group.agree("all_reduce", tensor.shape, tensor.dtype, "op", op)
    if tensor.is_contiguous():
        group.all_reduce(tensor, op)
        return tensor
    # On gloo a strided tensor is reduced as if it were dense, over its neighbours' memory.
    dense = tensor.contiguous()
    group.all_reduce(dense, op)
    return tensor.copy_(dense)


def broadcast(group: CheckedGroup, tensor: Tensor, src: int) -> Tensor:
    """Fill the tensor with that of group rank ``src``, in place; returns the tensor."""
    group.peer(src, "src")
    group.agree("broadcast", tensor.shape, tensor.dtype, "src", src)
    if tensor.is_contiguous():
        operators.broadcast(group, tensor, src)
        return tensor
    dense = tensor.contiguous()
    operators.broadcast(group, dense, src)
    return tensor.copy_(dense)


def all_gather(
    group: CheckedGroup, tensor: Tensor, dim: int, lengths: Sequence[int] | None = None
) -> Tensor:
    """Concatenate the pieces of all ranks along ``dim``.

    Args:
        group: The ranks.
        tensor: This rank's piece.
        dim: Dimension along which pieces are joined.
        lengths: Length of each rank's piece along ``dim``; default: all equal to this one's.

    Raises:
        ParallelConfigError: ``dim`` or ``lengths`` do not fit the tensor.
    """
    dim = checked_dim(dim, tensor)
    lengths = checked_lengths(group, tensor, dim, lengths)
    flat, shapes = _gather_flat(group, tensor, dim, lengths)
    if math.prod(tensor.shape[:dim]) == 1:
        return flat.view(_with_length(tensor, dim, sum(lengths)))  # the pieces lie in order
    return torch.cat(_pieces(flat, shapes), dim)


def all_gather_pieces(
    group: CheckedGroup, tensor: Tensor, dim: int = 0, lengths: Sequence[int] | None = None
) -> list[Tensor]:
    """As `all_gather`, but the pieces as a list in rank order (views of one buffer)."""
    dim = checked_dim(dim, tensor) if tensor.ndim else 0
    lengths = checked_lengths(group, tensor, dim, lengths) if tensor.ndim else [1] * group.size
    return _pieces(*_gather_flat(group, tensor, dim, lengths))


def gather(
    group: CheckedGroup,
    tensor: Tensor,
    dst: int,
    dim: int,
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """As `all_gather`, on group rank ``dst`` only; ``None`` on the others."""
    group.peer(dst, "dst")
    dim = checked_dim(dim, tensor)
    lengths = checked_lengths(group, tensor, dim, lengths)
    group.agree("gather", _any_length(tensor, dim), tensor.dtype, "dst", dst, "lengths", lengths)
    if group.rank != dst:
        wait_all(group.iexchange([(tensor.contiguous(), dst)], [], "gather"))
        return None
    pieces = [
        tensor if rank == dst else tensor.new_empty(_with_length(tensor, dim, length))
        for rank, length in enumerate(lengths)
    ]
    wait_all(group.iexchange([], [(p, r) for r, p in enumerate(pieces) if r != dst], "gather"))
    return torch.cat(pieces, dim)


def reduce_scatter(
    group: CheckedGroup,
    tensor: Tensor,
    dim: int,
    lengths: Sequence[int] | None = None,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> Tensor:
    """Reduce over the ranks and keep piece ``rank`` along ``dim``.

    Args:
        group: The ranks.
        tensor: The whole tensor, of the same shape on every rank.
        dim: Dimension that is split.
        lengths: Length of each rank's result along ``dim``; default: equal parts.
        op: SUM, MAX, MIN or PRODUCT.

    Raises:
        ParallelConfigError: ``dim``, ``lengths`` or ``op`` do not fit.
    """
    dim = checked_dim(dim, tensor)
    lengths = split_lengths(group, tensor, dim, lengths)
    if op not in _REDUCERS:
        msg = f"reduce_scatter cannot do {op}; legal here: SUM, MAX, MIN, PRODUCT"
        raise ParallelConfigError(msg)
    group.check_reducible(tensor.dtype)
    group.agree("reduce_scatter", tensor.shape, tensor.dtype, "op", op, "lengths", lengths)
    pieces = [piece.reshape(-1) for piece in torch.split(tensor, lengths, dim)]
    flat = torch.cat(pieces)
    shape = _with_length(tensor, dim, lengths[group.rank])
    mine = math.prod(shape)
    if len(set(lengths)) == 1:
        out = tensor.new_empty(mine)
        group.reduce_scatter(out, flat, op)
        return out.view(shape)
    # Backends scatter equal parts only. Each rank gets the others' versions of its own part.
    out = tensor.new_empty(group.size * mine)
    sizes = [piece.numel() for piece in pieces]
    group.all_to_all(out, flat, [mine] * group.size, sizes, "reduce_scatter")
    return _REDUCERS[op](out.view(group.size, *shape))


def all_to_all(
    group: CheckedGroup,
    tensor: Tensor,
    scatter_dim: int,
    gather_dim: int,
    scatter_lengths: Sequence[int] | None = None,
    gather_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Split along one dimension, send piece r to rank r, join what arrives along another.

    Each rank sends the elements that its peers lack, once: ``(P - 1) / P`` of its tensor.

    Args:
        group: The ranks.
        tensor: This rank's part: whole along ``scatter_dim``, its own piece of ``gather_dim``.
        scatter_dim: Dimension that is split; whole before, a piece after.
        gather_dim: Dimension that is joined; a piece before, whole after.
        scatter_lengths: Length of each rank's piece of ``scatter_dim``; default: equal parts.
        gather_lengths: Length of each rank's piece of ``gather_dim``; default: all equal to
            this one's.

    Raises:
        ParallelConfigError: The dimensions are the same, or lengths do not fit the tensor.
    """
    scatter_dim, gather_dim = checked_dim(scatter_dim, tensor), checked_dim(gather_dim, tensor)
    if scatter_dim == gather_dim:
        msg = f"all_to_all splits and joins dimension {scatter_dim}; they must be two dimensions"
        raise ParallelConfigError(msg)
    scatter_lengths = split_lengths(group, tensor, scatter_dim, scatter_lengths)
    gather_lengths = checked_lengths(group, tensor, gather_dim, gather_lengths)
    shape = list(tensor.shape)
    shape[scatter_dim] = scatter_lengths[group.rank]
    shapes = []
    for length in gather_lengths:
        shape[gather_dim] = length
        shapes.append(tuple(shape))
    sent = [piece.reshape(-1) for piece in torch.split(tensor, scatter_lengths, scatter_dim)]
    in_sizes = [piece.numel() for piece in sent]
    out_sizes = [math.prod(shape) for shape in shapes]
    group.agree_on_sizes("all_to_all", tensor.dtype, in_sizes, out_sizes)
    out = tensor.new_empty(sum(out_sizes))
    group.all_to_all(out, torch.cat(sent), out_sizes, in_sizes)
    if math.prod(shapes[0][:gather_dim]) == 1:
        shape[gather_dim] = sum(gather_lengths)
        return out.view(shape)  # the pieces lie in order already
    return torch.cat(_pieces(out, shapes), gather_dim)


def checked_dim(dim: int, tensor: Tensor) -> int:
    """The dimension counted from 0.

    Raises:
        ParallelConfigError: The tensor has no such dimension.
    """
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = (
            f"dim={dim} does not exist in a tensor of shape {tuple(tensor.shape)}; "
            f"legal here: {-tensor.ndim} to {tensor.ndim - 1}"
        )
        raise ParallelConfigError(msg)
    return dim % tensor.ndim


def checked_lengths(
    group: CheckedGroup, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> list[int]:
    """The length of each rank's piece along ``dim``, this rank's being that of the tensor.

    Raises:
        ParallelConfigError: Not one length for each rank, a negative one, or another for this
            rank than the tensor has.
    """
    own = tensor.shape[dim]
    if lengths is None:
        return [own] * group.size
    _check_count(group, lengths)
    if lengths[group.rank] != own:
        msg = (
            f"group rank {group.rank} of group {group.name!r} holds a tensor of shape "
            f"{tuple(tensor.shape)}, of length {own} along dimension {dim}, where lengths="
            f"{list(lengths)} say {lengths[group.rank]}"
        )
        raise ParallelConfigError(msg)
    return list(lengths)


def split_lengths(
    group: CheckedGroup, tensor: Tensor, dim: int, lengths: Sequence[int] | None
) -> list[int]:
    """The length of each rank's piece of ``tensor`` along ``dim``, which they add up to.

    Raises:
        ParallelConfigError: The lengths do not add up, or the length does not divide and no
            lengths were given.
    """
    whole = tensor.shape[dim]
    if lengths is None:
        if whole % group.size:
            low = whole - whole % group.size
            msg = (
                f"dimension {dim} of shape {tuple(tensor.shape)} cannot be split evenly over the "
                f"{group.size} ranks of group {group.name!r}; nearest lengths that can: {low} and "
                f"{low + group.size}; or pass the length of each rank's piece"
            )
            raise ParallelConfigError(msg)
        return [whole // group.size] * group.size
    _check_count(group, lengths)
    if sum(lengths) != whole:
        msg = (
            f"lengths={list(lengths)} add up to {sum(lengths)}, but dimension {dim} of shape "
            f"{tuple(tensor.shape)} is {whole} long"
        )
        raise ParallelConfigError(msg)
    return list(lengths)


def _check_count(group: CheckedGroup, lengths: Sequence[int]) -> None:
    if len(lengths) != group.size or any(length < 0 for length in lengths):
        msg = (
            f"lengths={list(lengths)} for group {group.name!r}: it needs {group.size} lengths, "
            "one for each rank, none negative"
        )
        raise ParallelConfigError(msg)


def _gather_flat(
    group: CheckedGroup, tensor: Tensor, dim: int, lengths: Sequence[int]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    even = len(set(lengths)) == 1
    group.agree("all_gather", _any_length(tensor, dim), tensor.dtype, "lengths", lengths)
    shapes = [_with_length(tensor, dim, length) for length in lengths]
    sizes = [math.prod(shape) for shape in shapes]
    flat = tensor.new_empty(sum(sizes))
    mine = tensor.reshape(-1).contiguous()  # a strided vector stays strided in reshape
    if even and group.backend != "gloo":
        group.all_gather(flat, mine)
    else:
        # Uneven pieces, which all_gather refuses; and gloo's all_gather, which takes three
        # times as long as its all_to_all for the same bytes (measured with torch 2.13).
        sent = [mine.numel()] * group.size
        group.all_to_all(flat, mine.repeat(group.size), sizes, sent, "all_gather")
    return flat, shapes


def _pieces(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _with_length(tensor: Tensor, dim: int, length: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if shape:
        shape[dim] = length
    return tuple(shape)


def _any_length(tensor: Tensor, dim: int) -> list[object]:
    """The shape for messages of the debug mode, with a star where ranks may differ."""
    return ["*" if i == dim else size for i, size in enumerate(tensor.shape)]
