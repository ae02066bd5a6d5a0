"""Padding on shards: of modules that pad alone, and of convolutions that pad unusually."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.sharded_forward import ShardedForward
from omni_vae_patch.spatial.windows import REMEDY, Window, reached, wrapped

Undo = Callable[[], None]
CIRCULAR = (nn.CircularPad2d, nn.CircularPad3d)
REFLECTING = (nn.ReflectionPad2d, nn.ReflectionPad3d)
PADS: tuple[type[nn.Module], ...] = (
    *CIRCULAR,
    *REFLECTING,
    nn.ConstantPad2d,  # and, as all zero pads, their subclasses
    nn.ConstantPad3d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
)


class ShardedPad(ShardedForward):
    """Stands in the place of ``module.forward`` of a module that pads.

    It pads every shard, and tells how much: the convolution that follows puts the rows of the
    neighbours in the place of those that are not at the border of the whole.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """As ``forward``."""
        shard = self._region.shard
        if shard is None:
            return self._original(x)
        shard.expect_no_padding(self._where)
        at = 2 * (-1 - shard.dim)
        before, after = self._module.padding[at : at + 2]
        if not (before or after):
            return self._original(x)
        if isinstance(self._module, CIRCULAR):
            padded = self._around(x, shard, before, after)
        else:
            padded = self._original(x)
        shard.tell_padding(self._where, padded.shape[shard.dim], before, after)
        return padded

    def _around(self, x: Tensor, shard: SpatialShard, before: int, after: int) -> Tensor:
        first, last = wrapped(x, shard, before, after)
        amounts = list(self._module.padding)
        at = 2 * (-1 - shard.dim)
        amounts[at : at + 2] = [0, 0]
        return pad(torch.cat([first, x, last], shard.dim), amounts, mode="circular")


def shard_pad(name: str, module: Any, region: Region) -> Undo:
    """Have a module that pads do so at the border of the whole.

    Raises:
        ParallelConfigError: It takes rows away.
    """
    if min(module.padding) < 0:
        msg = (
            f"module {name!r}, a {type(module).__name__}, pads by {tuple(module.padding)}, and "
            f"rows that are taken away are missing on one rank alone; legal: 0 or more; {REMEDY}"
        )
        raise ParallelConfigError(msg)
    return put(module, "forward", ShardedPad(name, module, region))


def pads_unusually(module: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a convolution pads around the whole, or more after it than before."""
    return module.padding_mode == "circular" or (
        module.padding == "same"
        and any(d * (k - 1) % 2 for k, d in zip(module.kernel_size, module.dilation, strict=True))
    )


def windows_of(module: nn.Conv2d | nn.Conv3d) -> dict[int, Window]:
    """How a convolution moves along each side."""
    found = {}
    for side in range(-len(module.kernel_size), 0):
        reach = module.dilation[side] * (module.kernel_size[side] - 1)
        if isinstance(module.padding, str):
            before = reach // 2 if module.padding == "same" else 0
            after = reach - before if module.padding == "same" else 0
        else:
            before = after = int(module.padding[side])
        found[side] = Window(reach + 1, module.stride[side], before, after)
    return found


class UnusuallyPadded:
    """Stands in the place of ``module._conv_forward`` of a convolution that pads unusually.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: nn.Conv2d | nn.Conv3d, region: Region) -> None:
        self._where = f"module {name!r}, a {type(module).__name__},"
        self._module = module
        self._region = region
        self._original: Callable[[Tensor, Tensor, Tensor | None], Tensor] = module._conv_forward
        self._windows = windows_of(module)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As ``_conv_forward``."""
        shard = self._region.shard
        if shard is None:
            return self._original(x, weight, bias)
        shard.expect_no_padding(self._where)
        window = self._windows[shard.dim]
        window.check(shard.lengths(x.shape[shard.dim], self._where), self._where)
        joined = self._with_others(self._joined(x, shard, window), shard.dim)
        module = self._module
        convolve = torch.conv2d if isinstance(module, nn.Conv2d) else torch.conv3d
        out = convolve(joined, weight, bias, module.stride, 0, module.dilation, module.groups)
        if out.ndim == 5:
            shard.frames = out.shape[2]
        return out

    def _joined(self, x: Tensor, shard: SpatialShard, window: Window) -> Tensor:
        before, after, mode = window.before, window.beyond, self._module.padding_mode
        if not (before or after):
            return x
        dim = shard.dim
        if mode == "circular":
            first, last = wrapped(x, shard, before, after)
            return torch.cat([first, x, last], dim)
        joined = reached(x, shard, before, after, self._where, None if mode != "zeros" else 0.0)
        if mode == "reflect":
            joined = self._mirrored(x, joined, shard, (before, after))
        return joined

    def _mirrored(
        self, x: Tensor, joined: Tensor, shard: SpatialShard, rows: tuple[int, int]
    ) -> Tensor:
        dim, (before, after) = shard.dim, rows
        top = before if shard.is_first else 0
        bottom = after if shard.is_last else 0
        inner = joined.narrow(dim, top, joined.shape[dim] - top - bottom)
        amounts = [0, 0] * (x.ndim - 2)
        at = 2 * (-1 - dim)
        amounts[at : at + 2] = [top, bottom]
        return pad(inner, amounts, mode="reflect")

    def _with_others(self, x: Tensor, dim: int) -> Tensor:
        """Padded along the sides that are whole."""
        amounts: list[int] = []
        for side in range(-1, -1 - len(self._windows), -1):
            window = self._windows[side]
            amounts += (0, 0) if side == dim else (window.before, window.after)
        mode = self._module.padding_mode
        return pad(x, amounts, "constant" if mode == "zeros" else mode) if any(amounts) else x


def shard_unusually_padded(name: str, module: nn.Conv2d | nn.Conv3d, region: Region) -> Undo:
    """Have a convolution work on shards that pads around the whole, or unevenly."""
    return put(module, "_conv_forward", UnusuallyPadded(name, module, region))


def rows_for_padding(module: nn.Module) -> int:
    """Rows that a rank needs for what a module pads; 1 if it does not."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if not pads_unusually(module):
            return 1
        windows = windows_of(module)
        return 1 + max(max(windows[side].before, windows[side].after) for side in (-2, -1))
    if isinstance(module, (*CIRCULAR, *REFLECTING)):
        padding: Any = module.padding
        return 1 + int(max(padding[:4]))
    return 1
