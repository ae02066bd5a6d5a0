"""The work of one attention call on this rank, once its tensors are sorted out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator
from omni_sp.attention import ulysses
from omni_sp.attention.blocks import KeyBlock, gathered, merged_causal, rotating
from omni_sp.attention.heads import HeadShare, head_shares, paired
from omni_sp.attention.masks import SequenceMask, in_natural_order, in_order_of
from omni_sp.attention.merge import MergedAttention
from omni_sp.attention.volume import Degrees
from omni_sp.kernels import AttentionKernel
from omni_sp.shards import Run, SequenceShards

Triple = tuple[Tensor, Tensor, Tensor]
"""Query, key and value."""
MaybeTriple = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Call:
    """What stays the same during one call."""

    kernel: AttentionKernel
    merge_dtype: torch.dtype
    rotate: bool
    mask: SequenceMask | None
    is_causal: bool
    scale: float | None
    shards: SequenceShards
    kv_shards: SequenceShards
    rank: int
    degrees: Degrees

    @property
    def alike(self) -> bool:
        """Whether keys lie on the ranks as queries do."""
        return self.kv_shards is self.shards or self.kv_shards == self.shards

    def members(self, ring_rank: int) -> range:
        """Ranks of the whole group that are the Ulysses group with this Ring rank."""
        return range(ring_rank * self.degrees.ulysses, (ring_rank + 1) * self.degrees.ulysses)

    @property
    def ring_rank(self) -> int:
        """Position of this rank's Ulysses group in the ring."""
        return self.rank // self.degrees.ulysses

    def runs_of(self, shards: SequenceShards, ring_rank: int) -> tuple[Run, ...]:
        """Runs of the sharded tokens of one Ulysses group, in rank order."""
        return tuple(run for member in self.members(ring_rank) for run in shards.runs(member))

    def over_ring(
        self,
        sharded: Triple,
        replicated: MaybeTriple,
        share: HeadShare | None,
        ring: GroupCoordinator | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the queries of this Ulysses group to the keys of the whole ring.

        Returns:
            Output for the sharded and for the replicated queries.
        """
        query, key, value = sharded
        common, common_key, common_value = replicated
        rows = self.runs_of(self.shards, self.ring_rank)
        if common is not None:
            query = torch.cat([query, common], 1)
            rows += self.shards.replicated_runs()
        blocks = self._blocks(key, value, ring)
        if common_key is not None and common_value is not None:
            more = KeyBlock(common_key, common_value, self.kv_shards.replicated_runs())
            blocks = _with(blocks, more)
        out = self._attend(query, rows, blocks, share, merge=ring is not None and self.rotate)
        own = sharded[0].shape[1]
        return (out, None) if common is None else (out[:, :own], out[:, own:])

    def _blocks(
        self, key: Tensor, value: Tensor, ring: GroupCoordinator | None
    ) -> Iterator[KeyBlock]:
        if ring is None:
            yield KeyBlock(key, value, self.runs_of(self.kv_shards, self.ring_rank))
            return
        runs = [self.runs_of(self.kv_shards, other) for other in range(ring.world_size)]
        if self.rotate:
            yield from rotating(key, value, runs, ring)
        else:
            yield gathered(key, value, runs, ring)

    def _attend(
        self,
        query: Tensor,
        rows: tuple[Run, ...],
        blocks: Iterator[KeyBlock],
        share: HeadShare | None,
        merge: bool,
    ) -> Tensor:
        if self.is_causal and (merge or not self._covers(rows)):
            return merged_causal(query, rows, blocks, self.kernel, self.merge_dtype, self.scale)
        if merge:
            merged = MergedAttention(self.merge_dtype)
            for block in blocks:
                if query.numel() and block.key.shape[1]:
                    mask = self._mask(rows, block, share)
                    merged.add(
                        *self.kernel.attend_with_lse(
                            query,
                            block.key,
                            block.value,
                            attn_mask=mask,
                            is_causal=False,
                            scale=self.scale,
                        )
                    )
            out = merged.result(query.dtype)
            return query.new_zeros(*query.shape[:3], block.value.shape[3]) if out is None else out
        (block,) = blocks
        if not query.numel() or not block.key.shape[1]:
            return query.new_zeros(*query.shape[:3], block.value.shape[3])
        key, value = block.key, block.value
        if self.is_causal:
            query = in_natural_order(query, rows, 1)
            key, value = (in_natural_order(t, block.runs, 1) for t in (key, value))
        out = self.kernel.attend(
            query,
            key,
            value,
            attn_mask=self._mask(rows, block, share),
            is_causal=self.is_causal,
            scale=self.scale,
        )
        return in_order_of(out, rows, 1) if self.is_causal else out

    def _covers(self, rows: tuple[Run, ...]) -> bool:
        return sum(run.length for run in rows) == self.shards.length

    def _mask(
        self, rows: tuple[Run, ...], block: KeyBlock, share: HeadShare | None
    ) -> Tensor | None:
        return None if self.mask is None else self.mask.block(rows, block.runs, share)


def _with(blocks: Iterator[KeyBlock], more: KeyBlock) -> Iterator[KeyBlock]:
    """The blocks, the first one together with tokens that every rank holds."""
    first = next(blocks)
    yield KeyBlock(
        torch.cat([first.key, more.key], 1),
        torch.cat([first.value, more.value], 1),
        first.runs + more.runs,
    )
    yield from blocks


def over_ulysses(
    call: Call,
    sharded: Triple,
    replicated: MaybeTriple,
    group: GroupCoordinator,
    ring: GroupCoordinator | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with heads shared out over a Ulysses group, and the result brought back."""
    query, key, value = sharded
    heads, kv_heads = query.shape[2], key.shape[2]
    shares = head_shares(heads, kv_heads, group.world_size)
    share = shares[group.rank_in_group]
    queries = [(s.start, s.stop) for s in shares]
    pairs = [(s.kv_start, s.kv_stop) for s in shares]
    members = call.members(call.ring_rank)
    lengths = [call.shards.sharded_length(member) for member in members]
    kv_lengths = [call.kv_shards.sharded_length(member) for member in members]
    packs, tokens = [[(query, queries)], [(key, pairs)], [(value, pairs)]], [lengths]
    if key.shape[-1] == value.shape[-1]:
        packs[1:] = [[(key, pairs), (value, pairs)]]
    if query.shape[-1] == key.shape[-1] and call.alike:
        packs[:2] = [packs[0] + packs[1]]
    tokens += [kv_lengths] * (len(packs) - 1)
    whole_query, whole_key, whole_value = ulysses.gather_sequence(packs, tokens, group)
    common, common_key, common_value = replicated
    if common is not None:
        common = common[:, :, share.start : share.stop]
    if common_key is not None and common_value is not None:
        common_key, common_value = (
            paired(t[:, :, share.kv_start : share.kv_stop], share, heads, kv_heads)
            for t in (common_key, common_value)
        )
    whole_key, whole_value = (paired(t, share, heads, kv_heads) for t in (whole_key, whole_value))
    out, shared = call.over_ring(
        (whole_query, whole_key, whole_value), (common, common_key, common_value), share, ring
    )
    if shared is None:
        return ulysses.gather_heads(out, shares, lengths, group)
    both = torch.cat([out, shared], 1)
    return ulysses.gather_heads(both, shares, lengths, group, shared.shape[1])
