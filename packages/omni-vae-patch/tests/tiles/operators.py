"""Operators for the executor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from omni_group_coordinator import GroupCoordinator
from omni_vae_patch.autoencoders import DistributedOperator, GridSpec, TileTask


def world_group() -> GroupCoordinator:
    return GroupCoordinator.from_process_group(dist.group.WORLD, name="vae")


def pieces_of(
    lengths: list[int], execute: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None
) -> DistributedOperator:
    """Cuts the last dimension, and joins what comes out along its last."""

    def split(z: Tensor) -> tuple[list[TileTask], GridSpec]:
        parts = torch.split(z, lengths, dim=-1)
        tasks = [TileTask(i, (i,), part, part.numel()) for i, part in enumerate(parts)]
        return tasks, GridSpec((z.ndim - 1,), (len(parts),), {}, dtype)

    def merge(found: dict[tuple[int, ...], Tensor], spec: GridSpec) -> Tensor:
        return torch.cat([found[index,] for index in range(spec.grid_shape[0])], -1)

    return DistributedOperator(split, lambda task: execute(task.tensor), merge)
