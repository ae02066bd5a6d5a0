"""What the tests of attention share: a described call, and its comparison with the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    Segment,
    SequenceParallelConfig,
    SequenceShards,
    sequence_parallel_attention,
)

POISON = 1e4


@dataclass(frozen=True)
class Call:
    """One attention call over a split sequence."""

    segments: tuple[Segment, ...]
    kv_segments: tuple[Segment, ...] | None = None
    batch: int = 1
    kv_heads: int = 2
    group: int = 1
    """Query heads for each key/value head."""
    width: int = 8
    value_width: int = 8
    mask: Literal["none", "keys", "pairs", "bias", "causal"] = "none"
    local_mask: Literal["", "keys", "queries"] = ""
    """Which dimension of the mask has this rank's part only."""
    exchange: Literal["ring", "allgather", "auto"] = "ring"
    order: Literal["contiguous", "zigzag"] = "contiguous"
    dtype: torch.dtype = torch.float32
    merge_in_float32: bool = True
    seed: int = 0
    strided: bool = False
    """Tokens, and not the elements of a head, are neighbours in memory."""


def local(tensor: Tensor, shards: SequenceShards, rank: int, dim: int) -> Tensor:
    """A rank's part of a whole tensor, with poison as padding."""
    parts = []
    for piece in shards.pieces(rank):
        parts += [tensor.narrow(dim, run.start, run.length) for run in piece.runs]
        if piece.padding:
            shape = list(tensor.shape)
            shape[dim] = piece.padding
            parts.append(tensor.new_full(shape, POISON if tensor.dtype is not torch.bool else 1))
    return torch.cat([tensor.narrow(dim, 0, 0), *parts], dim)


def tensors(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and mask of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(call.seed)
    heads = call.kv_heads * call.group
    length = sum(segment.length for segment in call.segments)
    kv_length = sum(segment.length for segment in call.kv_segments or call.segments)

    def random(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator).to(call.dtype)

    query = random(call.batch, length, heads, call.width)
    key = random(call.batch, kv_length, call.kv_heads, call.width)
    value = random(call.batch, kv_length, call.kv_heads, call.value_width)
    mask = None
    if call.mask == "keys":
        mask = torch.rand(call.batch, 1, 1, kv_length, generator=generator) > 0.4
        mask[..., 0] = True
    elif call.mask == "pairs":
        mask = torch.rand(1, 1, length, kv_length, generator=generator) > 0.4
        mask[..., 0] = True
    elif call.mask == "bias":
        mask = random(call.batch, heads, length, kv_length)
    return query, key, value, mask


def whole_attention(call: Call) -> Tensor:
    """The call on one process, in float32."""
    query, key, value, mask = tensors(call)
    query, key, value = (t.float().transpose(1, 2) for t in (query, key, value))
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.float()
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=call.mask == "causal",
        scale=0.4,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def largest_error(call: Call, ulysses: int, ring: int) -> float:
    """Runs on each rank: the largest difference of its tokens from the whole."""
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    world_size, rank = ulysses * ring, state.rank
    shards = SequenceShards(call.segments, world_size, call.order)
    kv_shards = None
    if call.kv_segments is not None:
        kv_shards = SequenceShards(call.kv_segments, world_size, call.order)
    keys = kv_shards or shards
    query, key, value, mask = tensors(call)
    if mask is not None and call.local_mask == "keys":
        mask = local(mask, keys, rank, 3)
    if mask is not None and call.local_mask == "queries":
        mask = local(mask, shards, rank, 2)
    config = SequenceParallelConfig(
        ulysses,
        ring,
        kv_exchange=call.exchange,
        order=call.order,
        convert_to_fp32=call.merge_in_float32,
    )
    mine = [local(query, shards, rank, 1), local(key, keys, rank, 1), local(value, keys, rank, 1)]
    if call.strided:
        mine = [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in mine]
    found = sequence_parallel_attention(
        mine[0],
        mine[1],
        mine[2],
        config,
        shards=shards,
        kv_shards=kv_shards,
        attn_mask=mask,
        is_causal=call.mask == "causal",
        scale=0.4,
        state=state,
    )
    expected = local(whole_attention(call), shards, rank, 1)
    state.destroy()
    assert found.shape == expected.shape
    assert found.dtype is call.dtype
    errors = [0.0]
    for mine, wanted in zip(shards.strip(found, rank), shards.strip(expected, rank), strict=True):
        if mine is not None and wanted is not None and mine.numel():
            assert not mine.isnan().any()
            errors.append((mine.float() - wanted).abs().max().item())
    return max(errors)
