"""What can be known of an attention call before anything is sent."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_sp.attention.heads import check_grouping
from omni_sp.attention.masks import checked_mask
from omni_sp.shards import SequenceShards


def check_call(
    group: GroupCoordinator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shards: SequenceShards,
    kv_shards: SequenceShards,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """Check a call, on this rank alone; returns the mask with four dimensions.

    Raises:
        ParallelConfigError: With what was asked, why it cannot work, and what could.
    """
    _check_tensors(query, key, value)
    check_grouping(query.shape[2], key.shape[2])
    for name, tensor, lie in (("query", query, shards), ("key", key, kv_shards)):
        _check_length(name, tensor, lie, group)
    if is_causal and (mask is not None or shards != kv_shards):
        msg = (
            "causal attention takes no mask, and keys that lie on the ranks as the queries do; "
            "pass a mask that is causal instead"
        )
        raise ParallelConfigError(msg)
    if mask is None:
        return None
    if mask.device != query.device:
        msg = f"the attention mask is on {mask.device}, the query on {query.device}; move the mask"
        raise ParallelConfigError(msg)
    shape = (query.shape[0], query.shape[2])
    if mask.shape[-1] == kv_shards.length:
        return checked_mask(mask, shape, shards, kv_shards, group.rank_in_group)
    # What is this rank's length may be none of another's: all must know before any gathers.
    error = None
    try:
        full = checked_mask(mask, shape, shards, kv_shards, group.rank_in_group)
    except ParallelConfigError as found:
        error = found
    fits = torch.tensor([error is None], dtype=torch.int32)
    if error is None and group.all_reduce(fits, dist.ReduceOp.MIN).item():
        return full
    if error is not None:
        group.all_reduce(fits, dist.ReduceOp.MIN)
        raise error
    msg = (
        f"an attention mask of shape {tuple(mask.shape)} fits this rank's part of the keys, and "
        f"that of another rank does not; legal: all {kv_shards.length} keys, or each rank's own"
    )
    raise ParallelConfigError(msg)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if not query.ndim == key.ndim == value.ndim == 4:
        msg = f"query, key and value are (batch, sequence, heads, head_dim); got {shapes}"
        raise ParallelConfigError(msg)
    if (
        query.shape[0] != key.shape[0]
        or query.shape[-1] != key.shape[-1]
        or key.shape[:3] != value.shape[:3]
    ):
        msg = (
            f"query {shapes[0]}, key {shapes[1]} and value {shapes[2]} do not go together: the "
            "batch of all, the head_dim of query and key, and the sequence and heads of key and "
            "value must be equal"
        )
        raise ParallelConfigError(msg)
    if query.dtype is key.dtype is value.dtype and query.device == key.device == value.device:
        return
    for what in ("dtype", "device"):
        found = [str(getattr(t, what)).removeprefix("torch.") for t in (query, key, value)]
        if len(set(found)) > 1:
            msg = (
                f"query, key and value have the {what}s {', '.join(found)}; they travel together "
                f"and need one: convert them to {found[0]} first"
            )
            raise ParallelConfigError(msg)


def _check_length(
    name: str, tensor: Tensor, shards: SequenceShards, group: GroupCoordinator
) -> None:
    if shards.world_size != group.world_size:
        msg = (
            f"shards over {shards.world_size} ranks, but group {group.name!r} has "
            f"{group.world_size}; both must say the same"
        )
        raise ParallelConfigError(msg)
    expected = shards.local_length(group.rank_in_group)
    if tensor.shape[1] != expected:
        msg = (
            f"the {name} has {tensor.shape[1]} tokens (shape {tuple(tensor.shape)}); group rank "
            f"{group.rank_in_group} of {group.world_size} holds {expected} of "
            f"{' + '.join(str(segment.length) for segment in shards.segments)}"
        )
        raise ParallelConfigError(msg)
