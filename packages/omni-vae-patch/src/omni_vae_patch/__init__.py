"""Encoding and decoding of images and videos by autoencoders over several ranks."""

from omni_vae_patch.__about__ import __version__
from omni_vae_patch.autoencoders import (
    DistributedOperator,
    DistributedVaeExecutor,
    DistributedVaeMixin,
    GridSpec,
    TileTask,
)
from omni_vae_patch.parallelize import parallelize_vae
from omni_vae_patch.spatial.attention import shard_attention
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.rules import nothing_to_do, register_rule
from omni_vae_patch.spatial.shard import SpatialShard
from omni_vae_patch.strategy import VaePatchStrategy, strategy
from omni_vae_patch.tiles import TiledVae, enabled_tiling, seam_score, tiling_options
from omni_vae_patch.vae_config import VaeParallelConfig
from omni_vae_patch.vae_patch_parallel import (
    VaePatchParallelism,
    maybe_wrap_vae_decode_with_patch_parallelism,
)

__all__ = [
    "DistributedOperator",
    "DistributedVaeExecutor",
    "DistributedVaeMixin",
    "GridSpec",
    "Region",
    "SpatialShard",
    "TileTask",
    "TiledVae",
    "VaeParallelConfig",
    "VaePatchParallelism",
    "VaePatchStrategy",
    "__version__",
    "enabled_tiling",
    "maybe_wrap_vae_decode_with_patch_parallelism",
    "nothing_to_do",
    "parallelize_vae",
    "register_rule",
    "seam_score",
    "shard_attention",
    "strategy",
    "tiling_options",
]
