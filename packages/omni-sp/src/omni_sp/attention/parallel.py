"""Attention over the whole of a split sequence, in the way that the configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, SequenceParallelGroupCoordinator
from omni_parallel_state import ParallelState, get_parallel_state
from omni_sp.attention.call import Call, over_ulysses
from omni_sp.attention.checks import check_call
from omni_sp.attention.masks import whole_mask
from omni_sp.attention.volume import Degrees, cheapest
from omni_sp.kernels import AttentionKernel, TorchKernel
from omni_sp.shards import SequenceShards
from omni_sp.sp_config import SequenceParallelConfig


def sequence_parallel_attention(  # noqa: PLR0913  those of torch's function, and the shards
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SequenceParallelConfig,
    *,
    shards: SequenceShards,
    kv_shards: SequenceShards | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    state: ParallelState | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    For inference: no gradient passes the ranks. Costs `attention_volume` per call.

    Args:
        query: ``(batch, local sequence, heads, head_dim)``: this rank's tokens, all heads.
        key: ``(batch, local sequence, key/value heads, head_dim)``. The number of heads divides
            that of the queries (grouped heads); they travel as they are, not repeated.
        value: Like the key; its head width may differ.
        config: How the work is divided; its degrees are those of the state.
        shards: How the queries lie on the ranks.
        kv_shards: How the keys and values do; default: like the queries.
        attn_mask: Whatever broadcasts to ``(batch, heads, queries, keys)``, boolean (true attends)
            or an additive bias. Keys, and queries unless they are 1, are those of the whole
            sequence in natural order, or this rank's own.
        is_causal: A token attends to those up to its own position in the whole sequence.
        scale: Factor of the scores; default: ``1 / sqrt(head_dim)``.
        state: The ranks; default: the current state.

    Returns:
        ``(batch, local sequence, heads, head_dim of the values)``.

    Raises:
        ParallelConfigError: Shapes, mask, dtypes or degrees do not fit; says what would.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    config.check_degrees(state)
    attend = ParallelAttention(state.sp, config)
    return attend(
        query,
        key,
        value,
        shards=shards,
        kv_shards=kv_shards,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
    )


class ParallelAttention:
    """Attention over sequences that are split over one set of ranks.

    Args:
        group: The ranks, with their Ulysses and Ring sub-groups.
        config: How the work is divided.
        kernel: Computes attention on this rank; default: that of the configuration, else torch's.

    Attributes:
        world_size: Number of ranks.
        order: How tokens are dealt out, by the configuration.
    """

    def __init__(
        self,
        group: SequenceParallelGroupCoordinator,
        config: SequenceParallelConfig,
        kernel: AttentionKernel | None = None,
    ) -> None:
        self._group = group
        self._config = config
        self._kernel = kernel or config.kernel or TorchKernel()
        self._given = Degrees(group.ulysses_world_size, group.ring_world_size)
        self.world_size = group.world_size
        self.order = config.order

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        shards: SequenceShards,
        kv_shards: SequenceShards | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """See `sequence_parallel_attention`."""
        kv_shards = shards if kv_shards is None else kv_shards
        attn_mask = check_call(
            self._group, query, key, value, shards, kv_shards, attn_mask, is_causal
        )
        degrees, rank = self._given, self._group.rank_in_group
        if self._config.kv_exchange == "auto":
            degrees = cheapest(self._group.world_size, degrees, query.shape[2], key.shape[2])
        ulysses_group, ring_group = self._groups(degrees)
        mask = None
        if attn_mask is not None:
            dense = degrees.ulysses > 1
            mask = whole_mask(attn_mask, shards, kv_shards, self._group, dense)
        call = Call(
            kernel=self._kernel,
            merge_dtype=torch.float32 if self._config.convert_to_fp32 else query.dtype,
            rotate=self._config.kv_exchange == "ring",
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            shards=shards,
            kv_shards=kv_shards,
            rank=rank,
            degrees=degrees,
        )
        own, common = shards.strip(query, rank)
        keys, common_keys = kv_shards.strip(key, rank)
        values, common_values = kv_shards.strip(value, rank)
        sharded = (own, keys, values)
        replicated = (common, common_keys, common_values)
        if ulysses_group is None:
            out, shared = call.over_ring(sharded, replicated, None, ring_group)
        else:
            out, shared = over_ulysses(call, sharded, replicated, ulysses_group, ring_group)
        return shards.restore(out, shared, rank)

    def _groups(self, degrees: Degrees) -> tuple[GroupCoordinator | None, GroupCoordinator | None]:
        """The groups of the Ulysses and of the Ring ranks; ``None`` for one rank."""
        if degrees == self._given:
            return _several(self._group.ulysses), _several(self._group.ring)
        whole = _several(self._group)
        return (whole, None) if degrees.ulysses > 1 else (None, whole)


def _several(group: GroupCoordinator | None) -> GroupCoordinator | None:
    return None if group is None or group.world_size == 1 else group
