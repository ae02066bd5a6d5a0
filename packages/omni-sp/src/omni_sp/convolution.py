"""A convolution over the rows of an image whose rows are split over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omni_group_coordinator import ParallelConfigError, ParallelError, halo_exchange
from omni_sp.application import Application
from omni_sp.plan_entries import SequenceParallelConvolution
from omni_sp.region import ShardedRegion
from omni_sp.shards import piece_of


class ConvolvedRows:
    """Lends a convolution the rows of the neighbours, and takes what became of them away again.

    Args:
        name: Name of the module in the model.
        module: The convolution.
        plan: Whose rows they are.
        application: Knows the region of the call that is under way.

    Raises:
        ParallelConfigError: No ``nn.Conv2d`` that keeps the number of rows.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        plan: SequenceParallelConvolution,
        application: Application,
    ) -> None:
        self._where = f"module {name!r}"
        if not isinstance(module, nn.Conv2d) or not _keeps_rows(module):
            msg = (
                f"the plan takes {self._where} for a convolution over rows; legal: an nn.Conv2d "
                "of stride 1, zero padding, and as many rows out as in"
            )
            raise ParallelConfigError(msg)
        if application.order != "contiguous":
            msg = (
                f"{self._where} convolves rows, which must be neighbours; legal: order='contiguous'"
            )
            raise ParallelConfigError(msg)
        self._plan = plan
        self._reach = int(module.padding[0])
        self._application = application

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Have the module use it."""
        return [
            module.register_forward_pre_hook(self._extend),
            module.register_forward_hook(self._cut),
        ]

    def _region(self) -> ShardedRegion | None:
        region = self._application.region
        if region is None or self._reach == 0:
            return None
        return None if region.stream(self._plan.like, self._where).segment.replicated else region

    def _rows(self, region: ShardedRegion) -> list[int]:
        segment = region.stream(self._plan.like, self._where).segment
        size = region.group.world_size
        pieces = [piece_of(segment, size, rank, region.order) for rank in range(size)]
        return [piece.tokens // segment.unit for piece in pieces]

    def _extend(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        region = self._region()
        if region is None:
            return None
        rows, image = self._rows(region), args[0]
        if image.ndim != 4 or image.shape[2] != rows[region.group.rank_in_group]:
            msg = (
                f"{self._where}: expected (batch, channels, {rows[region.group.rank_in_group]} "
                f"rows, columns); found shape {tuple(image.shape)}"
            )
            raise ParallelError(msg)
        above, below = halo_exchange(image, 2, self._reach, self._reach, region.group, rows)
        return (torch.cat([above, image, below], 2), *args[1:])

    def _cut(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        region = self._region()
        if region is None:
            return output
        rows, rank = self._rows(region), region.group.rank_in_group
        return output.narrow(2, min(self._reach, sum(rows[:rank])), rows[rank])


def _keeps_rows(module: nn.Conv2d) -> bool:
    height = module.dilation[0] * (module.kernel_size[0] - 1)
    return (
        module.stride == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and 2 * int(module.padding[0]) == height
    )
