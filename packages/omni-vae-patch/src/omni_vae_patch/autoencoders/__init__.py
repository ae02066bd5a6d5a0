"""Executing work that is split into tiles on several ranks."""

from omni_vae_patch.autoencoders.distributed_vae_executor import (
    DistributedOperator,
    DistributedVaeExecutor,
    DistributedVaeMixin,
    GridSpec,
    TileTask,
)

__all__ = [
    "DistributedOperator",
    "DistributedVaeExecutor",
    "DistributedVaeMixin",
    "GridSpec",
    "TileTask",
]
