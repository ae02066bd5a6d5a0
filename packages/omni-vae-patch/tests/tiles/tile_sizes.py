"""Tiles that are small enough for small autoencoders."""

from __future__ import annotations

from typing import Any

from stock_autoencoders import AutoencoderCase


def small_tiles(vae: Any, case: AutoencoderCase, tile: int = 4, stride: int = 3) -> dict[str, Any]:
    """Options for tiles of a height and width given in latent positions.

    Where the autoencoder has an overlap instead of a stride, it is a quarter, or a half.
    """
    options: dict[str, Any] = {}
    for name in vars(vae):
        if name.startswith("tile_sample_min_") and name.endswith(("size", "height", "width")):
            options[name] = tile * case.scale
        elif name.startswith("tile_latent_min_") and name.endswith(("size", "height", "width")):
            options[name] = tile
        elif name.startswith("tile_sample_stride_") and name.endswith(("height", "width")):
            options[name] = stride * case.scale
        elif name.startswith("tile_overlap_factor"):
            # AutoencoderTiny divides by the overlap less one.
            options[name] = 0.5 if case.name.startswith("tiny") else 0.25
    if case.name.endswith("tiles-of-time"):
        options |= {"tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4}
        options |= {"use_framewise_decoding": True, "use_framewise_encoding": True}
    return options
