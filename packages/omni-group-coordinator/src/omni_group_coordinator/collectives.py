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
from omni_group_coordinator.checked_group import CheckedGroup, Place
from omni_group_coordinator.checks import (
    agree_on_refusals,
    any_length,
    check_count,
    checked_exchange,
    checked_pieces,
    checked_split,
    split_lengths,
)
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.payload import check_reducible, check_strided, is_plain, resolved
from omni_group_coordinator.pending_work import wait_all

_REDUCERS: dict[dist.ReduceOp.RedOpType, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    dist.ReduceOp.MAX: lambda stacked: stacked.amax(0),
    dist.ReduceOp.MIN: lambda stacked: stacked.amin(0),
    dist.ReduceOp.PRODUCT: lambda stacked: stacked.prod(0, dtype=stacked.dtype),
}


@agree_on_refusals
def all_reduce(
    group: CheckedGroup, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce over the ranks, in place; returns the tensor.

    Raises:
        ParallelConfigError: A dtype that backends only carry (float8, int16, ...).
    """
    check_reduce(tensor)
    group.agree("all_reduce", tensor.shape, tensor.dtype, "op", op)
    if is_plain(tensor):
        group.all_reduce(tensor, op)
        return tensor
    # On gloo a strided tensor is reduced as if it were dense, over its neighbours' memory.
    dense = resolved(tensor).contiguous()
    group.all_reduce(dense, op)
    return tensor.copy_(dense)


@agree_on_refusals
def broadcast(group: CheckedGroup, tensor: Tensor, src: int) -> Tensor:
    """Fill the tensor with that of group rank ``src``, in place; returns the tensor."""
    group.peer(src, "src")
    check_strided(tensor)
    group.agree("broadcast", tensor.shape, tensor.dtype, "src", src)
    if is_plain(tensor):
        operators.broadcast(group, tensor, src)
        return tensor
    dense = resolved(tensor).contiguous()
    operators.broadcast(group, dense, src)
    return tensor.copy_(dense)


@agree_on_refusals
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
    dim, lengths = checked_pieces(group, tensor, dim, lengths)
    flat, shapes = _gather_flat(group, tensor, dim, lengths)
    if math.prod(tensor.shape[:dim]) == 1:
        return flat.view(_with_length(tensor, dim, sum(lengths)))  # the pieces lie in order
    return torch.cat(_pieces(flat, shapes), dim)


@agree_on_refusals
def all_gather_pieces(
    group: CheckedGroup, tensor: Tensor, dim: int = 0, lengths: Sequence[int] | None = None
) -> list[Tensor]:
    """As `all_gather`, but the pieces as a list in rank order (views of one buffer)."""
    if tensor.ndim:
        dim, lengths = checked_pieces(group, tensor, dim, lengths)
    else:
        dim, lengths = 0, [1] * group.size
    return _pieces(*_gather_flat(group, tensor, dim, lengths))


@agree_on_refusals
def gather(
    group: CheckedGroup,
    tensor: Tensor,
    dst: int,
    dim: int,
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """As `all_gather`, on group rank ``dst`` only; ``None`` on the others."""
    group.peer(dst, "dst")
    dim, lengths = checked_pieces(group, tensor, dim, lengths)
    more = ("dst", dst, "dim", dim, "lengths", lengths)
    group.agree("gather", any_length(tensor, dim), tensor.dtype, *more)
    tensor = resolved(tensor)
    if group.rank != dst:
        wait_all(group.iexchange([(tensor.contiguous(), dst)], [], "gather"))
        return None
    pieces = [
        tensor if rank == dst else tensor.new_empty(_with_length(tensor, dim, length))
        for rank, length in enumerate(lengths)
    ]
    wait_all(group.iexchange([], [(p, r) for r, p in enumerate(pieces) if r != dst], "gather"))
    return torch.cat(pieces, dim)


@agree_on_refusals
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
    dim, lengths = check_reduce_scatter(group, tensor, dim, lengths, op)
    more = ("op", op, "dim", dim, "lengths", lengths)
    group.agree("reduce_scatter", tensor.shape, tensor.dtype, *more)
    pieces = [piece.reshape(-1) for piece in torch.split(resolved(tensor), lengths, dim)]
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


@agree_on_refusals
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
    scatter_dim, gather_dim, scatter_lengths, gather_lengths = checked_exchange(
        group, tensor, (scatter_dim, gather_dim), scatter_lengths, gather_lengths
    )
    more = ("split", scatter_dim, "join", gather_dim)
    group.agree("all_to_all", any_length(tensor, gather_dim), tensor.dtype, *more)
    shape = list(tensor.shape)
    shape[scatter_dim] = scatter_lengths[group.rank]
    shapes = []
    for length in gather_lengths:
        shape[gather_dim] = length
        shapes.append(tuple(shape))
    whole = resolved(tensor)
    sent = [piece.reshape(-1) for piece in torch.split(whole, scatter_lengths, scatter_dim)]
    in_sizes = [piece.numel() for piece in sent]
    out_sizes = [math.prod(shape) for shape in shapes]
    if group.debug and not torch.compiler.is_compiling():  # a trace must not turn sizes into text
        group.agree_on_exchange("all_to_all", sizes_text(in_sizes), sizes_text(out_sizes))
    out = tensor.new_empty(sum(out_sizes))
    group.all_to_all(out, torch.cat(sent), out_sizes, in_sizes)
    if math.prod(shapes[0][:gather_dim]) == 1:
        shape[gather_dim] = sum(gather_lengths)
        return out.view(shape)  # the pieces lie in order already
    return torch.cat(_pieces(out, shapes), gather_dim)


@agree_on_refusals
def all_to_all_flat(
    group: CheckedGroup, tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
) -> Tensor:
    """Send consecutive pieces of a vector to the ranks, and join what arrives in rank order.

    Args:
        group: The ranks.
        tensor: One dimension: the piece for rank 0, then that for rank 1, and so on.
        send_sizes: Elements for each rank; they add up to the tensor.
        receive_sizes: Elements from each rank.

    Raises:
        ParallelConfigError: The tensor has other dimensions, or the sizes do not fit.
    """
    sent, received = check_flat(group, tensor, send_sizes, receive_sizes)
    group.agree("all_to_all", ("*",), tensor.dtype)
    if group.debug and not torch.compiler.is_compiling():
        group.agree_on_exchange("all_to_all", sizes_text(sent), sizes_text(received))
    out = tensor.new_empty(sum(received))
    group.all_to_all(out, resolved(tensor).contiguous(), received, sent)
    return out


def check_flat(
    place: Place, tensor: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What `all_to_all_flat` refuses; else the sizes.

    Raises:
        ParallelConfigError: The tensor has other dimensions than one, or the sizes do not fit.
    """
    if tensor.ndim != 1:
        msg = f"all_to_all_flat takes a vector; got shape {tuple(tensor.shape)}; flatten it"
        raise ParallelConfigError(msg)
    sent = split_lengths(place, tensor, 0, send_sizes)
    check_count(place, receive_sizes)
    if sent[place.rank] != receive_sizes[place.rank]:
        msg = (
            f"group rank {place.rank} of group {place.name!r} keeps {sent[place.rank]} elements "
            f"for itself by send_sizes, but {receive_sizes[place.rank]} by receive_sizes"
        )
        raise ParallelConfigError(msg)
    return sent, list(receive_sizes)


def check_reduce(tensor: Tensor) -> None:
    """What `all_reduce` refuses.

    Raises:
        ParallelConfigError: A sparse tensor, or a dtype that backends only carry.
    """
    check_strided(tensor)
    check_reducible(tensor.dtype)


def check_reduce_scatter(
    place: Place,
    tensor: Tensor,
    dim: int,
    lengths: Sequence[int] | None,
    op: dist.ReduceOp.RedOpType,
) -> tuple[int, list[int]]:
    """What `reduce_scatter` refuses; else the dimension and the length of each rank's piece.

    Raises:
        ParallelConfigError: ``dim``, ``lengths``, ``op`` or the dtype do not fit.
    """
    dim, lengths = checked_split(place, tensor, dim, lengths)
    if op not in _REDUCERS:
        msg = f"reduce_scatter cannot do {op}; legal here: SUM, MAX, MIN, PRODUCT"
        raise ParallelConfigError(msg)
    check_reducible(tensor.dtype)
    return dim, lengths


def sizes_text(sizes: Sequence[int]) -> dict[int, str]:
    """How many elements go to each rank, in words."""
    return {rank: f"{size} elements" for rank, size in enumerate(sizes) if size}


def _gather_flat(
    group: CheckedGroup, tensor: Tensor, dim: int, lengths: Sequence[int]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    even = len(set(lengths)) == 1
    more = ("dim", dim, "lengths", lengths)
    group.agree("all_gather", any_length(tensor, dim), tensor.dtype, *more)
    shapes = [_with_length(tensor, dim, length) for length in lengths]
    sizes = [math.prod(shape) for shape in shapes]
    flat = tensor.new_empty(sum(sizes))
    mine = resolved(tensor).reshape(-1).contiguous()  # a strided vector stays strided in reshape
    if even and not group.gathers_slowly(tensor):
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
