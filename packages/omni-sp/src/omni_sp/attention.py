"""Attention over a sequence that is split over ranks, in place of torch's own.

While a sharded region runs, a torch function mode takes the calls of
``scaled_dot_product_attention``: no model code is touched, and nothing outside the region sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    split_sizes,
)
from omni_sp._eager import outside_traces


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: GroupCoordinator,
    lengths: Sequence[int],
    **options: Any,
) -> Tensor:
    """Attention over the whole sequence, computed by each rank for its share of the heads.

    DeepSpeed-Ulysses (arXiv 2309.14509): one all-to-all of query, key and value together, and one
    of the result. Where heads do not divide over the ranks, some ranks compute one head more;
    where there are fewer heads than ranks, some compute none.

    Args:
        query: ``(batch, heads, local sequence, head_dim)``: this rank's tokens, all heads.
        key: As ``query``.
        value: As ``query``.
        group: The ranks.
        lengths: Tokens of each rank.
        **options: Keyword arguments of ``scaled_dot_product_attention``.

    Returns:
        ``(batch, heads, local sequence, head_dim)``.

    Raises:
        ParallelConfigError: The three shapes differ.
    """
    if not query.shape == key.shape == value.shape:
        msg = (
            "sequence-parallel attention takes query, key and value of one shape; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. Grouped heads "
            "and cross-attention inside the sharded region are not in this version of omni-sp"
        )
        raise ParallelConfigError(msg)
    heads = split_sizes(query.shape[1], group.world_size)
    packed = group.all_to_all(
        torch.stack((query, key, value)), 2, 3, scatter_lengths=heads, gather_lengths=lengths
    )
    whole_query, whole_key, whole_value = packed.unbind(0)
    out = torch.empty_like(whole_query)
    if out.numel():  # some kernels end the process on a call without heads or tokens
        out = scaled_dot_product_attention(whole_query, whole_key, whole_value, **options)
    return group.all_to_all(out, 2, 1, scatter_lengths=lengths, gather_lengths=heads)


class ShardedAttention(TorchFunctionMode):
    """Runs each attention call of a sharded region over the whole sequence.

    Args:
        group: The ranks.
        lengths: Gives the tokens of each rank, or ``None`` where nothing is sharded right now:
            attention is then local.

    Attributes:
        calls: How many attention calls ran over the whole sequence.
    """

    def __init__(
        self, group: GroupCoordinator, lengths: Callable[[], Sequence[int] | None]
    ) -> None:
        super().__init__()
        self._group = group
        self._lengths = lengths
        # A trace would take the kernel's call in there for another one of the model's.
        self._attend_eagerly = outside_traces(ShardedAttention._attend)
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each function of its API."""
        kwargs = dict(kwargs or {})
        lengths = self._lengths() if func is scaled_dot_product_attention else None
        if lengths is None:
            return func(*args, **kwargs)
        self.calls += 1
        return self._attend_eagerly(self, lengths, *args, **kwargs)

    def _attend(
        self,
        lengths: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p:
            msg = (
                "attention with a mask, causal attention and dropout inside the sharded region "
                "are not in this version of omni-sp; run this model without sequence parallelism"
            )
            raise ParallelConfigError(msg)
        local = lengths[self._group.rank_in_group]
        if query.shape[-2] != local or query.ndim != 4:
            msg = (
                f"attention inside the sharded region has queries of shape {tuple(query.shape)}; "
                f"expected (batch, heads, {local}, head_dim): {local} is what this rank holds of "
                f"the {sum(lengths)} tokens that attend by the plan (attends=True)"
            )
            raise ParallelError(msg)
        return ulysses_attention(query, key, value, self._group, lengths, **options)
