"""Parallel attention as one operator that torch.compile takes as it is.

Everything in it runs eagerly, with real sizes: the communication of every mode, any kernel, and
the ring, whose steps overlap. A trace holds the call alone, whose output is like its query.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from omni_group_coordinator import ParallelError
from omni_sp.attention.parallel import ParallelAttention
from omni_sp.shards import Order, Segment, SequenceShards

_keys = itertools.count()
_attentions: WeakValueDictionary[str, ParallelAttention] = WeakValueDictionary()


def register(attention: ParallelAttention) -> str:
    """Make an attention known to the operator; returns the key that a trace holds."""
    key = f"attention/{next(_keys)}"
    _attentions[key] = attention
    return key


class AttentionCall(NamedTuple):
    """What an attention call is beside its tensors."""

    attention: str
    """What `register` returned."""
    segments: tuple[Segment, ...]
    """The streams of the queries."""
    kv_segments: tuple[Segment, ...]
    """The streams of the keys."""
    is_causal: bool = False
    """As in `ParallelAttention`."""
    scale: float | None = None
    """As in `ParallelAttention`."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    """Attention by a registered `ParallelAttention`, in a trace and outside of one.

    Args:
        query: As in `ParallelAttention`.
        key: As in `ParallelAttention`.
        value: As in `ParallelAttention`.
        mask: As ``attn_mask`` there.
        call: Everything else.
    """
    if not torch.compiler.is_compiling():
        return _run(query, key, value, mask, call)
    segments, kv_segments = _coded(call.segments), _coded(call.kv_segments)
    out: Tensor = _attend(
        query, key, value, mask, call.attention, segments, kv_segments, call.is_causal, call.scale
    )
    return out


def _run(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: AttentionCall
) -> Tensor:
    attention = _attentions.get(call.attention)
    if attention is None:
        msg = "the model is no longer sequence-parallel; compile it again, without the old graph"
        raise ParallelError(msg)
    size, order = attention.world_size, attention.order
    return attention(
        query,
        key,
        value,
        shards=_shards(call.segments, size, order),
        kv_shards=_shards(call.kv_segments, size, order),
        attn_mask=mask,
        is_causal=call.is_causal,
        scale=call.scale,
    )


@lru_cache(maxsize=1024)
def _shards(segments: tuple[Segment, ...], world_size: int, order: Order) -> SequenceShards:
    return SequenceShards(segments, world_size, order)


def _coded(segments: tuple[Segment, ...]) -> list[int]:
    """Segments as what an operator takes: four numbers for each."""
    numbers = []
    for segment in segments:
        numbers += [segment.length, int(segment.replicated), int(segment.padded), segment.unit]
    return numbers


def _decoded(numbers: Sequence[int]) -> tuple[Segment, ...]:
    rows = (numbers[i : i + 4] for i in range(0, len(numbers), 4))
    return tuple(Segment(length, bool(r), bool(p), unit) for length, r, p, unit in rows)


@torch.library.custom_op("omni_sp::attend", mutates_args=())
def _attend(  # noqa: PLR0913, PLR0917  an operator takes no tuples of tuples
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attention: str,
    segments: Sequence[int],
    kv_segments: Sequence[int],
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    streams, kv_streams = _decoded(segments), _decoded(kv_segments)
    call = AttentionCall(attention, streams, kv_streams, is_causal, scale)
    return _run(query, key, value, mask, call).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
