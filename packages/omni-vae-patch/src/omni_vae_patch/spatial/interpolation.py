"""Interpolation on shards, by the rows of neighbours and the positions of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.attributes import put
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.spatial.sharded_forward import ShardedForward
from omni_vae_patch.spatial.windows import REMEDY, reached

Undo = Callable[[], None]

# Rows on either side of a position that its value is made of.
_REACH = {
    "nearest": 0,
    "nearest-exact": 0,
    "area": 0,
    "bilinear": 1,
    "trilinear": 1,
    "bicubic": 2,
}
_FINEST = 1024


class Ratio(NamedTuple):
    """So many rows of the result for each of so many rows; in lowest terms."""

    made: int
    of: int

    def at(self, rows: int) -> int:
        """Rows of the result for so many."""
        return rows * self.made // self.of


class ShardedUpsample(ShardedForward):
    """Stands in the place of ``module.forward`` of an ``nn.Upsample``.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: nn.Upsample, region: Region) -> None:
        super().__init__(name, module, region)
        # Not within calls, which torch.compile traces.
        self._ratios = {side: _ratio_of(module, side) for side in (-2, -1)}

    def __call__(self, x: Tensor) -> Tensor:
        """As ``forward``."""
        shard = self._region.shard
        return self._original(x) if shard is None else self._resized(x, shard)

    def _resized(self, x: Tensor, shard: SpatialShard) -> Tensor:
        dim, mode = shard.dim, self._module.mode
        shard.expect_no_padding(self._where)
        lengths = shard.lengths(x.shape[dim], self._where)
        scale = self._scale(dim, lengths)
        if mode in ("bilinear", "trilinear") and self._module.align_corners:
            return self._by_corners(x, shard, lengths, scale)
        # As many rows as make whole rows of the result.
        halo = -(-_REACH[mode] // scale.of) * scale.of
        joined = reached(x, shard, halo, halo, self._where, None)
        out = self._call(joined, dim, scale.at(joined.shape[dim]))
        return out.narrow(dim, scale.at(halo), scale.at(x.shape[dim])) if halo else out

    def _scale(self, dim: int, lengths: Sequence[int]) -> Ratio:
        """Rows of the result for each row.

        Raises:
            ParallelConfigError: On every rank alike: some rank's rows do not give whole rows.
        """
        module, scale = self._module, self._ratios[dim]
        if module.size is not None:
            made, total = _of_side(module.size, dim), sum(lengths)
            common = math.gcd(made, total)
            scale = Ratio(made // common, total // common)
        if scale is None or any(length % scale.of for length in lengths):
            asked = module.scale_factor if module.size is None else f"size {module.size}"
            msg = (
                f"{self._where} resizes by {asked}, and the rows of the ranks, {list(lengths)}, do "
                f"not give whole rows; legal: factors that do; or {REMEDY}"
            )
            raise ParallelConfigError(msg)
        return scale

    def _call(self, x: Tensor, dim: int, rows: int) -> Tensor:
        """As torch's, of some rows of the whole, of which so many rows are to come."""
        module = self._module
        if module.size is None:
            return self._original(x)
        size = [_of_side(module.size, side) for side in range(2 - x.ndim, 0)]
        size[dim] = rows
        return interpolate(x, size, None, module.mode, module.align_corners)

    def _by_corners(
        self, x: Tensor, shard: SpatialShard, lengths: Sequence[int], scale: Ratio
    ) -> Tensor:
        """Linear, with the corners in place: positions are by the size of the whole."""
        dim, total = shard.dim, sum(lengths)
        spans = [_span(lengths, rank, scale) for rank in range(len(lengths)) if lengths[rank]]
        starts = [sum(lengths[:rank]) for rank in range(len(spans))]
        before = max(0, *(starts[r] - span[0] for r, span in enumerate(spans)))
        after = max(0, *(span[1] - starts[r] - lengths[r] for r, span in enumerate(spans)))
        joined = reached(x, shard, before, after, self._where, None)
        across = self._across(joined, dim)
        begin = starts[shard.rank]
        made = range(scale.at(begin), scale.at(begin + x.shape[dim]))
        at = [_position(row, total, scale) for row in made]
        low = [whole for whole, _ in at]
        offset = starts[shard.rank] - before
        first = torch.tensor([row - offset for row in low])
        second = torch.tensor([min(row + 1, total - 1) - offset for row in low])
        shape = [1] * x.ndim
        shape[dim] = len(low)
        weights = torch.tensor([part for _, part in at], dtype=x.dtype)
        device = x.device
        upper = across.index_select(x.ndim + dim, first.to(device, non_blocking=True))
        lower = across.index_select(x.ndim + dim, second.to(device, non_blocking=True))
        return torch.lerp(upper, lower, weights.to(device, non_blocking=True).view(shape))

    def _across(self, x: Tensor, dim: int) -> Tensor:
        """Resized along the other sides alone."""
        module, size = self._module, []
        for side in range(2 - x.ndim, 0):
            if side == dim:
                size.append(x.shape[side])
            elif module.size is not None:
                size.append(_of_side(module.size, side))
            else:
                size.append(int(x.shape[side] * float(_of_side(module.scale_factor, side))))
        return interpolate(x, size, None, module.mode, True)


def _ratio_of(module: nn.Upsample, side: int) -> Ratio | None:
    """Of a factor, along a side; ``None`` if it is none of small numbers, or not given."""
    if module.scale_factor is None:
        return None
    from fractions import Fraction  # brings decimal, whose import is a tenth of this package's

    factor = float(_of_side(module.scale_factor, side))
    found = Fraction(factor).limit_denominator(_FINEST)
    if not found or abs(float(found) - factor) > 1e-9 * factor:
        return None
    return Ratio(found.numerator, found.denominator)


def _position(row: int, total: int, scale: Ratio) -> tuple[int, float]:
    """Where in the whole a row of the result is taken from: the row, and how far beyond it."""
    gaps = max(1, scale.at(total) - 1)
    row, rest = divmod(row * (total - 1), gaps)
    return row, rest / gaps


def _span(lengths: Sequence[int], rank: int, scale: Ratio) -> tuple[int, int]:
    """First and last row, exclusive, that a rank's results are made of."""
    total, start = sum(lengths), sum(lengths[:rank])
    first, _ = _position(scale.at(start), total, scale)
    last, _ = _position(scale.at(start + lengths[rank]) - 1, total, scale)
    return first, min(last + 2, total)


def _of_side(value: Any, side: int) -> Any:
    return value[side] if isinstance(value, tuple | list) else value


def shard_upsample(name: str, module: nn.Upsample, region: Region) -> Undo:
    """Have an ``nn.Upsample`` work on shards.

    Raises:
        ParallelConfigError: It is of a kind that cannot.
    """
    mode = module.mode
    if mode not in _REACH or (mode == "bicubic" and module.align_corners):
        corners = " with align_corners=True" if module.align_corners else ""
        msg = (
            f"module {name!r}, a {type(module).__name__}, interpolates by {mode!r}{corners}, which "
            f"is not known on shards; legal: {', '.join(map(repr, _REACH))}, the last without "
            f"align_corners; or {REMEDY}"
        )
        raise ParallelConfigError(msg)
    return put(module, "forward", ShardedUpsample(name, module, region))
