"""Tiles of an autoencoder's own tiling, divided over ranks."""

from omni_vae_patch.agreement import PeerOutOfMemoryError
from omni_vae_patch.tiles.options import enabled_tiling, tiling_options
from omni_vae_patch.tiles.seams import seam_score
from omni_vae_patch.tiles.tiled_vae import TiledVae

__all__ = [
    "PeerOutOfMemoryError",
    "TiledVae",
    "enabled_tiling",
    "seam_score",
    "tiling_options",
]
