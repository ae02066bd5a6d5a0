"""Convolutions on shards: the rows that a kernel reaches beyond them come from the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard

Convolution = nn.Conv2d | nn.Conv3d
Undo = Callable[[], None]


@dataclass(frozen=True)
class Reach:
    """How a convolution moves along one side.

    Attributes:
        kernel: Rows from the first to the last that it reads at once, dilation included.
        stride: Rows from one output to the next.
        padding: Rows that the module itself puts on either side.
    """

    kernel: int
    stride: int
    padding: int

    @classmethod
    def of(cls, module: Convolution, dim: int) -> Reach:
        """Along a side of a module."""
        padding = module.padding
        if isinstance(padding, str):
            total = module.dilation[dim] * (module.kernel_size[dim] - 1)
            own = total // 2 if padding == "same" else 0
        else:
            own = padding[dim]
        kernel = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        return cls(kernel, module.stride[dim], own)

    @property
    def is_local(self) -> bool:
        """Whether no output needs rows of two shards."""
        return self.kernel <= self.stride and not self.padding

    @property
    def neighbours(self) -> int:
        """Rows of a neighbour that an output needs at most."""
        # An even kernel reaches further down; before a stride, a neighbour has several rows.
        return self.kernel // 2 if self.stride == 1 else (self.kernel - 1) // 2

    def padded_by_caller(self, length: int) -> tuple[int, int]:
        """Rows that the caller has put before and after the shard.

        Without padding of its own a convolution keeps rows in step with its input only if the
        caller pads. Shards begin at multiples of the stride, so the length tells how much: the
        kernel's reach on both sides, or, as before the strided convolutions of encoders, one row
        at the end.

        Args:
            length: Rows of the input.
        """
        if self.padding or self.is_local:
            return 0, 0
        if self.stride == 1:
            return (self.kernel - 1) // 2, self.kernel // 2
        extra = length % self.stride
        if extra == self.kernel - self.stride:
            return 0, extra
        return (self.kernel - 1) // 2, (self.kernel - 1) // 2

    def check(self, rows: int, by_module: bool, where: str) -> None:
        """Check that rows stay in step with shards.

        Args:
            rows: Put before and after, in all; 0 if the caller does so.
            by_module: Whether a module before this one has put them.
            where: The module, for messages.

        Raises:
            ParallelConfigError: They do not, or both modules pad.
        """
        if by_module and self.padding:
            why = "pads what another module has padded before; legal: padding by one of them"
        elif (rows or by_module) and not self.kernel - self.stride <= rows < self.kernel:
            why = (
                f"has {rows} rows of padding, with which rows do not stay in step with shards; "
                f"legal here: {max(0, self.kernel - self.stride)} to {self.kernel - 1} in all"
            )
        else:
            return
        msg = (
            f"{where}, a convolution, {why}; or register a rule for its class "
            "(omni_vae_patch.register_rule), or use mode='tile'"
        )
        raise ParallelConfigError(msg)

    def halo(self, before: int) -> tuple[int, int]:
        """Rows needed before and after a shard, where so many were put before it."""
        return before, max(0, self.kernel - self.stride - before)


class ShardedConvolution:
    """Stands in the place of ``module._conv_forward``.

    Not of ``forward``: causal convolutions of video join a cache of frames and pad in theirs, and
    then call this one.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: Convolution, region: Region) -> None:
        self._where = f"module {name!r}"
        self._module = module
        self._region = region
        self._original: Callable[[Tensor, Tensor, Tensor | None], Tensor] = module._conv_forward
        self._reach = {dim: Reach.of(module, dim) for dim in (-2, -1)}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As ``_conv_forward``."""
        shard = self._region.shard
        if shard is None:
            return self._original(x, weight, bias)
        reach = self._reach[shard.dim]
        out = (
            self._original(x, weight, bias)
            if reach.is_local
            else self._convolved(x, weight, bias, shard, reach)
        )
        if out.ndim == 5:
            shard.frames = out.shape[2]
        return out

    def _convolved(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, shard: SpatialShard, reach: Reach
    ) -> Tensor:
        dim = shard.dim
        length = x.shape[dim]
        told = shard.take_padding(length, self._where)
        top, bottom = told or reach.padded_by_caller(length)
        reach.check(top + bottom if told else 2 * reach.padding, told is not None, self._where)
        own = x.narrow(dim, top, length - top - bottom)
        before, after = reach.halo(reach.padding or top)
        shard.check_reach(own.shape[dim], before, after, self._where)
        if reach.stride == 1 and before + after <= own.shape[dim]:
            near = before + after
            arrived = shard.halo_meanwhile(own, before, after, self._where)
            out = self._original(x, weight, bias)
            first, last = arrived()
            return self._mended(out, weight, bias, shard, (first, own, last), near)
        first, last = shard.halo(own, before, after, self._where)
        # At the borders of the whole stands what would stand there on one rank.
        if shard.is_first:
            first = x.narrow(dim, 0, top) if top else self._border(own, dim, before, 0)
        if shard.is_last:
            last = x.narrow(dim, length - bottom, bottom)
            if not bottom:
                last = self._border(own, dim, 0, after)
        joined = torch.cat([first, own, last], dim)
        return self._without_padding(joined, weight, bias, dim)

    def _mended(
        self,
        out: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shard: SpatialShard,
        rows: tuple[Tensor, Tensor, Tensor],
        near: int,
    ) -> Tensor:
        """The convolution of a shard as it is, and anew the few rows that need a neighbour's.

        A copy of the shard that has those rows beside it would take as long as a narrow
        convolution, and the neighbour's rows are under way meanwhile.

        Args:
            out: The convolution of the shard as it is.
            weight: Of the module.
            bias: Of the module.
            shard: The call that is under way.
            rows: The rows before the shard, the shard, and the rows after it.
            near: How many rows of the shard an output row sees beside those of a neighbour.
        """
        dim, (first, own, last) = shard.dim, rows
        before, after = first.shape[dim], last.shape[dim]
        if before and not shard.is_first:
            joined = torch.cat([first, own.narrow(dim, 0, near)], dim)
            part = self._without_padding(joined, weight, bias, dim)
            out.narrow(dim, 0, before).copy_(part)
        if after and not shard.is_last:
            joined = torch.cat([own.narrow(dim, own.shape[dim] - near, near), last], dim)
            part = self._without_padding(joined, weight, bias, dim)
            out.narrow(dim, out.shape[dim] - after, after).copy_(part)
        return out

    def _border(self, own: Tensor, dim: int, before: int, after: int) -> Tensor:
        """What the module's own padding puts beyond the border of the whole."""
        if not (before or after):
            return own.narrow(dim, 0, 0)
        mode = self._module.padding_mode
        if mode == "zeros":
            shape = list(own.shape)
            shape[dim] = before + after
            return own.new_zeros(shape)
        amounts = [0, 0] * (own.ndim - 2)
        at = 2 * (-1 - dim)
        amounts[at : at + 2] = [before, after]
        padded = pad(own, amounts, mode=mode)
        return padded.narrow(dim, 0 if before else own.shape[dim], before + after)

    def _without_padding(self, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
        """The convolution, whose own padding along one side is there already."""
        module = self._module
        amounts = self._other_padding(dim)
        if module.padding_mode != "zeros" and any(amounts):
            x = pad(
                x,
                [n for amount in reversed(amounts) for n in (amount, amount)],
                module.padding_mode,
            )
            amounts = [0] * len(amounts)
        convolve = torch.conv2d if isinstance(module, nn.Conv2d) else torch.conv3d
        return convolve(x, weight, bias, module.stride, amounts, module.dilation, module.groups)

    def _other_padding(self, dim: int) -> list[int]:
        sides = len(self._module.kernel_size)
        amounts = [
            self._reach[side].padding if side in self._reach else self._time_padding()
            for side in range(-sides, 0)
        ]
        amounts[dim] = 0
        return amounts

    def _time_padding(self) -> int:
        padding = self._module.padding
        reach = self._module.dilation[0] * (self._module.kernel_size[0] - 1)
        return reach // 2 if padding == "same" else int(padding[0])


def shard_convolution(name: str, module: Convolution, region: Region) -> Undo:
    """Have a convolution work on shards that pads as much before as after, if at all."""
    return put(module, "_conv_forward", ShardedConvolution(name, module, region))


def least_rows(module: Convolution) -> int:
    """Rows that a rank needs for a convolution.

    As many as its neighbours reach for, and one more where the border is mirrored.
    """
    mirrored = int(module.padding_mode == "reflect")
    reaches = [Reach.of(module, dim) for dim in (-2, -1)]
    return max(1, *(max(r.neighbours, r.padding) + mirrored * (r.padding > 0) for r in reaches))
