"""Attention over space: each rank's queries, and the keys and values of all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state.rebinding import subclass_with
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard

Undo = Callable[[], None]


class SpatialAttention:
    """What a module calls in place of torch's attention and of what goes with it.

    Args:
        name: Name of the module in the autoencoder.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, region: Region) -> None:
        self._where = f"attention of module {name!r}"
        self._region = region

    def replacement(self, value: Any) -> Any:
        """What stands for a function that a method of the module refers to."""
        return self.attend if value is scaled_dot_product_attention else value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """As torch's function: ``(batch, ..., tokens, width)``, the tokens those of this rank."""
        shard = self._region.shard
        if shard is not None:
            if is_causal:
                msg = f"{self._where} is causal over space, of which a rank holds a part"
                raise ParallelError(msg)
            lengths = shard.lengths(key.shape[-2], self._where)
            if attn_mask is not None:
                attn_mask = self._mask(attn_mask, query.shape[-2], lengths, shard)
            # Keys and values in one message. Their order is that of the ranks, which is not that
            # of the tokens where width is sharded; but a sum over keys has no order.
            width = key.shape[-1]
            pair = shard.gather(torch.cat([key, value], -1), key.ndim - 2, lengths)
            key, value = pair[..., :width], pair[..., width:]
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )

    def _mask(
        self, mask: Tensor, queries: int, lengths: Sequence[int], shard: SpatialShard
    ) -> Tensor:
        """The mask for the keys of all ranks.

        Autoencoders mask by frame: a token sees those of its own frame and of earlier ones. So
        the mask for this rank's keys has the value of each pair of frames, for any rank's.
        """
        frames, local = shard.frames, lengths[shard.rank]
        if mask.shape[-2] != queries or mask.shape[-1] < local or local % frames:
            msg = (
                f"{self._where} has a mask of shape {tuple(mask.shape)} for {queries} queries and "
                f"{local} keys of {frames} frames on this rank; expected one of pairs of frames"
            )
            raise ParallelError(msg)
        by_frame = mask[..., : local : local // frames]
        parts = [by_frame.repeat_interleave(n // frames, -1) for n in lengths if n]
        return torch.cat(parts, -1)


class LinearAttention:
    """Linear attention: its sum over tokens is one over the ranks.

    Args:
        region: Knows the call that is under way.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._sums = True

    def replacement(self, value: Any) -> Any:
        """What stands for a function that a method of the module refers to."""
        return self.matmul if value is torch.matmul else value

    def begin(self) -> None:
        """The next product is the one of values and keys."""
        self._sums = True

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """As torch's function; the first product of a call sums over the tokens."""
        product, shard = torch.matmul(left, right), self._region.shard
        sums, self._sums = self._sums, False
        return shard.stack(product).sum(0) if shard is not None and sums else product


def shard_attention(name: str, module: nn.Module, region: Region) -> Undo:
    """Have the attention of a module, or of its processor, be over the whole of a feature map.

    Raises:
        ParallelConfigError: It does not call torch's ``scaled_dot_product_attention``.
    """
    processor = getattr(module, "processor", None)
    owner = module if processor is None or not callable(processor) else processor
    cls = type(owner)
    subclass = subclass_with(cls, SpatialAttention(name, region).replacement)
    if subclass is None:
        msg = (
            f"module {name!r}, a {type(module).__name__}, attends by {cls.__name__}, which does "
            "not call torch's scaled_dot_product_attention; set a processor that does, or use "
            "mode='tile'"
        )
        raise ParallelConfigError(msg)
    if isinstance(owner, nn.Module):
        owner.__class__ = subclass
        return lambda: setattr(owner, "__class__", cls)
    stand_in = copy.copy(owner)
    stand_in.__class__ = subclass
    module.processor = stand_in

    def undo() -> None:
        if module.processor is stand_in:
            module.processor = owner

    return undo


def shard_linear_attention(name: str, module: Any, region: Region) -> Undo:
    """Have linear attention sum over the whole of a feature map.

    For modules with diffusers' methods ``apply_linear_attention`` and
    ``apply_quadratic_attention``, which give the same but for rounding, and of which the module
    picks one by the size of what it is given: of a shard it is always the first.
    """
    cls = type(module)
    linear = LinearAttention(region)
    subclass = subclass_with(cls, linear.replacement)
    if subclass is None:
        msg = f"module {name!r}, a {cls.__name__}, calls no torch.matmul that could be summed"
        raise ParallelConfigError(msg)
    quadratic = module.apply_quadratic_attention
    by_sums = subclass.apply_linear_attention  # type: ignore[attr-defined]

    def apply_linear(query: Tensor, key: Tensor, value: Tensor) -> Any:
        linear.begin()
        return by_sums(module, query, key, value)

    def apply_quadratic(query: Tensor, key: Tensor, value: Tensor) -> Any:
        if region.shard is None:
            return quadratic(query, key, value)
        wide = torch.float32
        return apply_linear(query.to(wide), key.to(wide), value.to(wide)).to(query.dtype)

    undo_linear = put(module, "apply_linear_attention", apply_linear)
    undo_quadratic = put(module, "apply_quadratic_attention", apply_quadratic)

    def undo() -> None:
        undo_quadratic()
        undo_linear()

    return undo
