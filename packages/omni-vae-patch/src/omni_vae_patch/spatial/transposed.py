"""Transposed convolutions on shards: rows to which inputs of two shards contribute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.sharded_forward import ShardedForward
from omni_vae_patch.spatial.windows import REMEDY

Undo = Callable[[], None]
TransposedConvolution = nn.ConvTranspose2d | nn.ConvTranspose3d


class ShardedTransposed(ShardedForward):
    """Stands in the place of ``module.forward`` of a transposed convolution."""

    def __call__(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ``forward``."""
        shard = self._region.shard
        if shard is None:
            return self._original(x, output_size)
        if output_size is not None:
            msg = f"{self._where} is told its output_size, which is not a shard's; {REMEDY}"
            raise ParallelConfigError(msg)
        shard.expect_no_padding(self._where)
        out = self._convolved(x, shard)
        if out.ndim == 5:
            shard.frames = out.shape[2]
        return out

    def _convolved(self, x: Tensor, shard: SpatialShard) -> Tensor:
        module, dim = self._module, shard.dim
        self._check(dim)
        kernel, stride, padding = self._kernel(dim), module.stride[dim], module.padding[dim]
        # Row o is made of inputs i with  i * stride <= o + padding < i * stride + kernel.
        before = max(0, (kernel - 1 - padding) // stride)
        after = (stride - 1 + padding) // stride
        own = x.shape[dim]
        if before or after:
            first, last = shard.halo(x, before, after, self._where)
            before = first.shape[dim]
            x = torch.cat([first, x, last], dim)
        paddings = list(module.padding)
        paddings[dim] = 0
        convolve: Any = functional.conv_transpose2d if x.ndim == 4 else functional.conv_transpose3d
        out: Tensor = convolve(
            x,
            module.weight,
            module.bias,
            module.stride,
            paddings,
            module.output_padding,
            module.groups,
            module.dilation,
        )
        return out.narrow(dim, before * stride + padding, own * stride)

    def _kernel(self, dim: int) -> int:
        rows: int = self._module.dilation[dim] * (self._module.kernel_size[dim] - 1) + 1
        return rows

    def _check(self, dim: int) -> None:
        module = self._module
        stride, padding, extra = module.stride[dim], module.padding[dim], module.output_padding[dim]
        needed = stride + 2 * padding - extra
        if self._kernel(dim) != needed:
            msg = (
                f"{self._where} makes other than {stride} rows of each, so rows would not stay in "
                f"step with shards; legal: a kernel of {needed} rows, dilation included, instead "
                f"of {self._kernel(dim)}, or padding and output_padding that fit; or {REMEDY}"
            )
            raise ParallelConfigError(msg)


def shard_transposed(name: str, module: TransposedConvolution, region: Region) -> Undo:
    """Have a transposed convolution work on shards."""
    return put(module, "forward", ShardedTransposed(name, module, region))
