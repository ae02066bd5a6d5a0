"""What computes attention on one device, and the protocol by which another kernel is plugged in."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

_logger = logging.getLogger("omni_sp")


@runtime_checkable
class AttentionKernel(Protocol):
    """Attention on one device.

    Shapes are ``(batch, sequence, heads, head_dim)``. There may be fewer key/value heads than
    query heads: each then serves as many neighbouring query heads as fit. Neither sequence is
    empty: the caller sees to it.
    """

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """The attention output, ``(batch, query sequence, heads, head_dim)``.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            attn_mask: ``(batch or 1, heads or 1, query sequence or 1, key sequence)``: boolean,
                where true attends, or an additive bias.
            is_causal: A query attends to keys up to its own position; both sequences are then of
                one length and there is no mask.
            scale: Factor of the scores; ``None``: ``1 / sqrt(head_dim)``.
        """

    def attend_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, and the log of the sum of the exponentiated scores of each query.

        Ring attention merges partial results by it. A kernel that cannot give it raises
        `ParallelConfigError`.

        Returns:
            Output, and log-sum-exp in float32 of shape ``(batch, query sequence, heads)``;
            ``-inf`` where a query attends to no key.
        """


class TorchKernel:
    """torch's ``scaled_dot_product_attention``, on every device."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        """See `AttentionKernel`."""
        out = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)

    def attend_with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel`."""
        group = query.shape[2] // key.shape[2]
        if group > 1:
            key, value = (t.repeat_interleave(group, 2) for t in (key, value))
        # These kernels read memory as if the last dimension were dense, without a check.
        query, key, value = (
            (t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2)
            for t in (query, key, value)
        )
        bias = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
        out, lse = _attend_with_lse(query, key, value, bias, is_causal, scale)
        if bias is not None:
            # Kernels give such rows a log-sum-exp of 0, as if they had attended to something.
            lse = lse.masked_fill((bias == -math.inf).all(-1), -math.inf)
        return out.transpose(1, 2), lse.transpose(1, 2)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The fastest kernel with a log-sum-exp for the device; ``(batch, heads, sequence, ...)``.

    torch has no public function for it that is fast on CPU (2.13: ``flex_attention`` takes six
    times as long; ``varlen_attn`` is for CUDA alone), so these are operators behind its
    ``scaled_dot_product_attention``. Their signatures were checked on torch 2.13: that of the CPU
    by running it, those of CUDA (and ROCm, which shares them) against torch's own declarations.
    """
    aten = torch.ops.aten
    device, one_width = query.device.type, query.shape[-1] == value.shape[-1]
    if device in ("cpu", "meta") and one_width:
        return aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    if device == "cuda" and one_width:
        return _attend_on_cuda(query, key, value, bias, is_causal, scale)
    _log_plain_math(device)
    return _plain_math(query, key, value, bias, is_causal, scale)


def _attend_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    aten, width = torch.ops.aten, query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    if width % 8:  # which the kernels refuse, in half precision at least
        query, key, value = (pad(t, (0, -width % 8)) for t in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and bias is None and width <= 256:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, False, scale=scale
        )
        return found[0][..., :width], found[1]
    found = aten._scaled_dot_product_efficient_attention(
        query, key, value, _aligned(bias, query, key), True, 0.0, is_causal, scale=scale
    )
    # The log-sum-exp is padded to a multiple of 32.
    return found[0][..., :width], found[1][:, :, : query.shape[2]]


def _aligned(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A bias as the memory-efficient kernel takes it: expanded, rows at multiples of 16."""
    if bias is None:
        return None
    length = key.shape[2]
    wide = pad(bias, (0, -length % 16))[..., :length]
    return wide.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _plain_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0)  # rows that attend to nothing
    return (weights @ value.float()).to(query.dtype), lse


@lru_cache(maxsize=16)
def _log_plain_math(device: str) -> None:
    _logger.warning(
        "torch has no attention kernel with log-sum-exp for %s tensors of this kind: ring "
        "attention computes whole score matrices, which is slower; Ulysses and "
        "kv_exchange='allgather' do not",
        device,
    )
