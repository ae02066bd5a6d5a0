"""Halo exchange: the rows of the neighbours that a convolution on a shard needs.

The plan is arithmetic on the shards' lengths, so it holds for shards shorter than the halo (the
rows then come from ranks further away) and for empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.checks import agree_on_refusals, any_length, checked_pieces
from omni_group_coordinator.collectives import sizes_text
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.payload import resolved


class Span(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of the whole tensor, on one rank."""

    rank: int
    start: int
    stop: int


def halo_plan(
    lengths: Sequence[int], rank: int, before: int, after: int
) -> tuple[list[Span], list[Span]]:
    """The rows that a rank lacks on either side, in order, and who holds them.

    Args:
        lengths: Rows of each rank's shard.
        rank: The rank that asks; an empty shard needs nothing.
        before: Rows wanted before the shard; fewer are given at the edge of the whole.
        after: Rows wanted after the shard.

    Returns:
        Spans before and spans after the shard.
    """
    stops = list(accumulate(lengths))
    start, stop = stops[rank] - lengths[rank], stops[rank]
    if start == stop:
        return [], []
    wanted = ((start - before, start), (stop, stop + after))
    before_spans, after_spans = (
        [
            Span(peer, max(low, end - length), min(high, end))
            for peer, (end, length) in enumerate(zip(stops, lengths, strict=True))
            if peer != rank and max(low, end - length) < min(high, end)
        ]
        for low, high in wanted
    )
    return before_spans, after_spans


@agree_on_refusals
def exchange_halo(
    group: CheckedGroup,
    tensor: Tensor,
    dim: int,
    before: int,
    after: int,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fetch the rows that lie before and after this rank's shard.

    Args:
        group: The ranks, in the order of their shards.
        tensor: This rank's shard.
        dim: Dimension along which the whole was split.
        before: Rows wanted before the shard.
        after: Rows wanted after the shard.
        lengths: Rows of each rank's shard; default: all equal to this one's.

    Returns:
        Two tensors like the shard with at most ``before`` and ``after`` rows along ``dim``;
        fewer at the edges of the whole, none for an empty shard.

    Raises:
        ParallelConfigError: A negative halo, or lengths that do not fit the tensor.
    """
    dim, lengths = checked_pieces(group, tensor, dim, lengths)
    check_halo(before, after)
    if torch.compiler.is_compiling():
        rows: tuple[Tensor, Tensor] = _halo(tensor, group.key, dim, before, after, lengths)
        return rows
    return _exchange(group, tensor, dim, before, after, lengths)


def check_halo(before: int, after: int) -> None:
    """Check the numbers of rows that are asked for.

    Raises:
        ParallelConfigError: One is negative.
    """
    if before < 0 or after < 0:
        msg = f"a halo of {before} rows before and {after} after; legal: 0 or more"
        raise ParallelConfigError(msg)


def _exchange(
    group: CheckedGroup, tensor: Tensor, dim: int, before: int, after: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    more = ("dim", dim, "lengths", lengths)
    group.agree("halo", any_length(tensor, dim), tensor.dtype, *more)
    tensor = resolved(tensor)
    own = sum(lengths[: group.rank])
    sends: list[tuple[Tensor, int]] = []
    for peer in range(group.size):
        for span in _both(lengths, peer, before, after):
            if span.rank == group.rank:
                rows = tensor.narrow(dim, span.start - own, span.stop - span.start)
                sends.append((rows.contiguous(), peer))
    sides = halo_plan(lengths, group.rank, before, after)
    received = [
        [_empty_rows(tensor, dim, span.stop - span.start) for span in side] for side in sides
    ]
    receives = [
        (rows, span.rank)
        for side, spans in zip(received, sides, strict=True)
        for rows, span in zip(side, spans, strict=True)
    ]
    _agree(group, sends, receives)
    for work in group.iexchange(sends, receives, "halo"):
        work.wait()
    first, last = (
        torch.cat(rows, dim) if rows else _empty_rows(tensor, dim, 0) for rows in received
    )
    return first, last


def _both(lengths: Sequence[int], rank: int, before: int, after: int) -> list[Span]:
    first, last = halo_plan(lengths, rank, before, after)
    return first + last


def _agree(
    group: CheckedGroup,
    sends: Sequence[tuple[Tensor, int]],
    receives: Sequence[tuple[Tensor, int]],
) -> None:
    out, into = [0] * group.size, [0] * group.size
    for rows, peer in sends:
        out[peer] += rows.numel()
    for rows, peer in receives:
        into[peer] += rows.numel()
    group.agree_on_exchange("halo", sizes_text(out), sizes_text(into))


def _empty_rows(tensor: Tensor, dim: int, rows: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rows
    return tensor.new_empty(shape)


@torch.library.custom_op("omni_group_coordinator::halo", mutates_args=())
def _halo(
    tensor: Tensor, key: str, dim: int, before: int, after: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return _exchange(CheckedGroup.by_key(key), tensor, dim, before, after, lengths)


@_halo.register_fake
def _(
    tensor: Tensor, key: str, dim: int, before: int, after: int, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    sides = halo_plan(lengths, CheckedGroup.by_key(key).rank, before, after)
    first, last = (
        _empty_rows(tensor, dim, sum(span.stop - span.start for span in side)) for side in sides
    )
    return first, last
