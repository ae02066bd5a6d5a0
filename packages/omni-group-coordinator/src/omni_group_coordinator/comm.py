"""Communication of sharded attention and convolution: all-to-all, ring, halo.

Shapes are ``(batch, sequence, heads, head_dim)``; the packed form has the three of query, key
and value before the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from omni_group_coordinator import collectives
from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.checks import Alone, checked_exchange, checked_pieces
from omni_group_coordinator.coordinator import GroupCoordinator, checked_group_of
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.halo import check_halo, exchange_halo
from omni_group_coordinator.ring import RingComm, ring_shift

__all__ = [
    "RingComm",
    "SeqAllToAll4D",
    "SeqAllToAll5D",
    "all_to_all_4D",
    "all_to_all_5D",
    "halo_exchange",
    "ring_shift",
]

Group = GroupCoordinator | ProcessGroup | None


def all_to_all_4D(  # noqa: N802  the name it has in DeepSpeed
    input: Tensor,
    scatter_idx: int = 2,
    gather_idx: int = 1,
    group: Group = None,
    use_sync: bool = False,
    *,
    seq_lengths: Sequence[int] | None = None,
    head_counts: Sequence[int] | None = None,
) -> Tensor:
    """Exchange sequence shards for head shards, or back (DeepSpeed-Ulysses, arXiv 2309.14509).

    Bytes sent by a rank: ``(P - 1) / P`` of its tensor. Traces under torch.compile, with a
    `GroupCoordinator` as the group; for gradients use `SeqAllToAll4D`.

    Args:
        input: ``(batch, local sequence, heads, head_dim)`` for ``(scatter_idx, gather_idx)`` of
            ``(2, 1)``; ``(batch, sequence, local heads, head_dim)`` for ``(1, 2)``.
        scatter_idx: Dimension that is split: 2 (heads) or 1 (sequence).
        gather_idx: Dimension that is joined: 1 or 2, the other one.
        group: The ranks; default: torch's default group.
        use_sync: Wait for the device before returning. Slow; for debugging only.
        seq_lengths: Tokens of each rank's shard; default: all equal.
        head_counts: Heads of each rank; default: equal shares.

    Returns:
        ``(batch, sequence, local heads, head_dim)`` for ``(2, 1)``; ``(batch, local sequence,
        heads, head_dim)`` for ``(1, 2)``.

    Raises:
        ParallelConfigError: Another pair of dimensions or number of dimensions, or heads or
            tokens that do not divide over the ranks and no counts given.
    """
    checked = checked_group_of(group)
    _check(checked, "all_to_all_4D", input, (scatter_idx, gather_idx))
    heads_first = scatter_idx == 2
    lengths = (head_counts, seq_lengths) if heads_first else (seq_lengths, head_counts)
    return _all_to_all(input, (scatter_idx, gather_idx), checked, use_sync, lengths)


def all_to_all_5D(  # noqa: N802
    input: Tensor,
    scatter_idx: int = 3,
    gather_idx: int = 1,
    group: Group = None,
    use_sync: bool = False,
    *,
    seq_lengths: Sequence[int] | None = None,
    head_counts: Sequence[int] | None = None,
) -> Tensor:
    """As `all_to_all_4D` for query, key and value packed in one tensor: one collective for three.

    Args:
        input: ``(batch, local sequence, 3, heads, head_dim)`` for ``(3, 1)``; ``(batch,
            sequence, 3, local heads, head_dim)`` for ``(1, 3)``.
        scatter_idx: Dimension that is split: 3 (heads) or 1 (sequence).
        gather_idx: Dimension that is joined: 1 or 3, the other one.
        group: The ranks; default: torch's default group.
        use_sync: Wait for the device before returning. Slow; for debugging only.
        seq_lengths: Tokens of each rank's shard; default: all equal.
        head_counts: Heads of each rank; default: equal shares.

    Raises:
        ParallelConfigError: As `all_to_all_4D`, or the third dimension is not 3.
    """
    checked = checked_group_of(group)
    _check(checked, "all_to_all_5D", input, (scatter_idx, gather_idx))
    heads_first = scatter_idx == 3
    lengths = (head_counts, seq_lengths) if heads_first else (seq_lengths, head_counts)
    return _all_to_all(input, (scatter_idx, gather_idx), checked, use_sync, lengths)


def _check(group: CheckedGroup | None, name: str, tensor: Tensor, dims: tuple[int, int]) -> None:
    try:
        _check_call(name, tensor, dims)
    except ParallelConfigError as error:
        if group is not None:
            group.agree_to_refuse(name, error)
        raise


def _check_call(name: str, tensor: Tensor, dims: tuple[int, int]) -> None:
    ndim = 4 if name == "all_to_all_4D" else 5
    legal = (ndim - 2, 1)
    if tensor.ndim != ndim:
        msg = f"{name} takes a tensor of {ndim} dimensions; got shape {tuple(tensor.shape)}"
        raise ParallelConfigError(msg)
    if dims not in (legal, legal[::-1]):
        msg = (
            f"{name} with scatter_idx={dims[0]} and gather_idx={dims[1]}; legal: {legal} to "
            f"exchange sequence shards for head shards, {legal[::-1]} for the way back"
        )
        raise ParallelConfigError(msg)
    if ndim == 5 and tensor.shape[2] != 3:
        msg = (
            f"all_to_all_5D takes query, key and value packed in dimension 2, of size 3; got "
            f"shape {tuple(tensor.shape)}"
        )
        raise ParallelConfigError(msg)


def _all_to_all(
    tensor: Tensor,
    dims: tuple[int, int],
    checked: CheckedGroup | None,
    use_sync: bool,
    lengths: tuple[Sequence[int] | None, Sequence[int] | None],
) -> Tensor:
    if checked is None:
        checked_exchange(Alone("of one rank"), tensor, dims, *lengths)
        return tensor
    out = collectives.all_to_all(checked, tensor, *dims, *lengths)
    if use_sync and out.device.type != "cpu":
        torch.accelerator.synchronize(out.device)
    return out


class SeqAllToAll4D(torch.autograd.Function):
    """`all_to_all_4D` with a backward: gradients take the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        input: Tensor,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        use_sync: bool = False,
        seq_lengths: Sequence[int] | None = None,
        head_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """See `all_to_all_4D`."""
        ctx.call = (gather_idx, scatter_idx, group, use_sync)
        ctx.lengths = {"seq_lengths": seq_lengths, "head_counts": head_counts}
        out = all_to_all_4D(input, scatter_idx, gather_idx, group, use_sync, **ctx.lengths)
        return out.view_as(out)  # a group of one rank gives the input itself back

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradient of the input: the reverse exchange of the output's gradient."""
        return (None, all_to_all_4D(grads[0], *ctx.call, **ctx.lengths), *[None] * 5)


class SeqAllToAll5D(torch.autograd.Function):
    """`all_to_all_5D` with a backward: gradients take the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        input: Tensor,
        scatter_idx: int = 3,
        gather_idx: int = 1,
        use_sync: bool = False,
        seq_lengths: Sequence[int] | None = None,
        head_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """See `all_to_all_5D`."""
        ctx.call = (gather_idx, scatter_idx, group, use_sync)
        ctx.lengths = {"seq_lengths": seq_lengths, "head_counts": head_counts}
        out = all_to_all_5D(input, scatter_idx, gather_idx, group, use_sync, **ctx.lengths)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """The gradient of the input: the reverse exchange of the output's gradient."""
        return (None, all_to_all_5D(grads[0], *ctx.call, **ctx.lengths), *[None] * 5)


def halo_exchange(
    tensor: Tensor,
    dim: int,
    before: int,
    after: int,
    group: Group = None,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of the whole tensor that lie before and after this rank's shard of it.

    Traces under torch.compile, with a `GroupCoordinator` as the group.

    Args:
        tensor: This rank's shard, any number of dimensions.
        dim: Dimension along which the whole was split over the ranks in order.
        before: Rows wanted before the shard.
        after: Rows wanted after the shard.
        group: The ranks; default: torch's default group.
        lengths: Rows of each rank's shard (0 is legal); default: all equal.

    Returns:
        Tensors like the shard, with at most ``before`` and ``after`` rows along ``dim``: fewer
        at the edges of the whole, none for an empty shard. Shards shorter than the halo are
        fine: the rows then come from ranks further away.

    Raises:
        ParallelConfigError: A negative halo, or lengths that do not fit the tensor.
    """
    checked = checked_group_of(group)
    if checked is None:
        check_halo(before, after)
        dim, _ = checked_pieces(Alone("of one rank"), tensor, dim, lengths)
        nothing = tensor.narrow(dim, 0, 0)
        return nothing, nothing
    return exchange_halo(checked, tensor, dim, before, after, lengths)
