"""Pooling on shards: windows over the rows of neighbours, and means over the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.sharded_forward import ShardedForward
from omni_vae_patch.spatial.windows import REMEDY, Window, reached, sides

Undo = Callable[[], None]
Pool = nn.AvgPool2d | nn.AvgPool3d | nn.MaxPool2d | nn.MaxPool3d
AdaptivePool = (
    nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d | nn.AdaptiveMaxPool2d | nn.AdaptiveMaxPool3d
)


class ShardedPool(ShardedForward):
    """Stands in the place of ``module.forward`` of a pooling of averages or largest values.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: Pool, region: Region) -> None:
        super().__init__(name, module, region)
        self._averages = isinstance(module, nn.AvgPool2d | nn.AvgPool3d)
        self._count = 3 if isinstance(module, nn.AvgPool3d | nn.MaxPool3d) else 2
        self._windows = _windows_of(module, self._count)

    def __call__(self, x: Tensor) -> Tensor:
        """As ``forward``."""
        shard = self._region.shard
        return self._original(x) if shard is None else self._pooled(x, shard)

    def _pooled(self, x: Tensor, shard: SpatialShard) -> Tensor:
        dim, window = shard.dim, self._windows[shard.dim]
        shard.expect_no_padding(self._where)
        lengths = shard.lengths(x.shape[dim], self._where)
        window.check(lengths, self._where)
        fill = 0.0 if self._averages else -math.inf
        joined = reached(x, shard, window.before, window.beyond, self._where, fill)
        amounts: list[int] = []
        for side in range(-1, -1 - self._count, -1):
            other = self._windows[side]
            amounts += (0, 0) if side == dim else (other.before, other.end(x.shape[side]))
        if any(amounts):
            joined = pad(joined, amounts, value=fill)
        out = self._without_padding(joined)
        return self._weighed(out, x, shard, lengths) if self._averages else out

    def _without_padding(self, x: Tensor) -> Tensor:
        module: Any = self._module
        if not self._averages:
            pool = functional.max_pool2d if self._count == 2 else functional.max_pool3d
            largest: Tensor = pool(x, module.kernel_size, module.stride, 0, module.dilation)
            return largest
        mean = functional.avg_pool2d if self._count == 2 else functional.avg_pool3d
        average: Tensor = mean(x, module.kernel_size, module.stride)
        return average

    def _weighed(
        self, out: Tensor, x: Tensor, shard: SpatialShard, lengths: Sequence[int]
    ) -> Tensor:
        """From the mean of full windows to what the module divides by."""
        module: Any = self._module
        if module.divisor_override:
            full = math.prod(window.kernel for window in self._windows.values())
            return out * float(full / module.divisor_override)
        for side, window in self._windows.items():
            length = sum(lengths) if side == shard.dim else x.shape[side]
            first = sum(lengths[: shard.rank]) // window.stride if side == shard.dim else 0
            shares = _shares(window, length, module.count_include_pad)
            mine = shares[first : first + out.shape[side]]
            if any(share != 1 for share in mine):
                shape = [1] * out.ndim
                shape[side] = len(mine)
                weights = torch.tensor(mine, dtype=out.dtype)
                out = out * weights.to(out.device, non_blocking=True).view(shape)
        return out


def _windows_of(module: Any, count: int) -> dict[int, Window]:
    kernels, strides = sides(module.kernel_size, count), sides(module.stride, count)
    paddings = sides(module.padding, count)
    dilations = sides(getattr(module, "dilation", 1), count)
    return {
        at - count: Window(
            dilations[at] * (kernels[at] - 1) + 1,
            strides[at],
            paddings[at],
            paddings[at],
            module.ceil_mode,
        )
        for at in range(count)
    }


def _shares(window: Window, length: int, padded: bool) -> list[float]:
    """By what the mean of each full window is multiplied, so that it counts fewer rows."""
    starts = [i * window.stride - window.before for i in range(window.outputs(length))]
    stop, least = (length + window.after, starts[0]) if padded else (length, 0)
    return [
        window.kernel / (min(start + window.kernel, stop) - max(start, least)) for start in starts
    ]


def shard_pool(name: str, module: Pool, region: Region) -> Undo:
    """Have a pooling work on shards.

    Raises:
        ParallelConfigError: It returns where the largest values are.
    """
    if getattr(module, "return_indices", False):
        _refuse(name, module, "returns positions, which are those of a shard")
    return put(module, "forward", ShardedPool(name, module, region))


class ShardedAdaptivePool:
    """Stands in the place of ``module.forward`` of a pooling to a given size.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: AdaptivePool, region: Region) -> None:
        self._name = name
        self._module = module
        self._region = region
        self._original = module.forward
        self._averages = isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d)

    def __call__(self, x: Tensor) -> Tensor:
        """As ``forward``."""
        out: Tensor = self._original(x)
        shard = self._region.shard
        if shard is None:
            return out
        shard.expect_no_padding(f"module {self._name!r}")
        size = _output_size(self._module, shard.dim)
        if size is None:
            return out
        if size != 1:
            why = f"pools to {size} rows, of which a rank has no part; legal: 1, None"
            _refuse(self._name, self._module, why)
        ranks = shard.stack(out)
        if not self._averages:
            return ranks.amax(0)
        lengths = shard.lengths(x.shape[shard.dim], f"module {self._name!r}")
        counts = [n / sum(lengths) for n in lengths if n]
        weights = torch.tensor(counts, dtype=out.dtype).to(out.device, non_blocking=True)
        return torch.einsum("r...,r->...", ranks, weights)


def _output_size(module: AdaptivePool, dim: int) -> int | None:
    size: Any = module.output_size
    return size if size is None or isinstance(size, int) else size[dim]


def shard_adaptive_pool(name: str, module: AdaptivePool, region: Region) -> Undo:
    """Have a pooling to one row be over the whole.

    Raises:
        ParallelConfigError: It pools height and width to other sizes, or returns positions.
    """
    if getattr(module, "return_indices", False):
        _refuse(name, module, "returns positions, which are those of a shard")
    sizes = [_output_size(module, dim) for dim in (-2, -1)]
    if all(size not in (1, None) for size in sizes):
        _refuse(name, module, f"pools to {sizes}, of which a rank has no part; legal: 1, None")
    return put(module, "forward", ShardedAdaptivePool(name, module, region))


def check_power_pool(name: str, module: Any, region: Region) -> Undo:
    """The rule of a pooling of powers: local where windows neither overlap nor are cut short.

    Raises:
        ParallelConfigError: They do, or are.
    """
    kernel, stride = module.kernel_size, module.stride
    if module.ceil_mode or (stride is not None and sides(kernel, 3) != sides(stride, 3)):
        _refuse(name, module, "has windows that overlap or end early; legal: stride=kernel_size")
    steps = sides(kernel, 2)[-2:]
    original = module.forward

    def forward(x: Tensor) -> Any:
        shard = region.shard
        if shard is not None:
            where = f"module {name!r}, a {type(module).__name__},"
            step = steps[shard.dim]
            Window(step, step).check(shard.lengths(x.shape[shard.dim], where), where)
        return original(x)

    return put(module, "forward", forward)


def _refuse(name: str, module: nn.Module, why: str) -> None:
    msg = f"module {name!r}, a {type(module).__name__}, {why}; {REMEDY}"
    raise ParallelConfigError(msg)
