"""Autoencoders of diffusers with random weights, narrow enough for a CPU, and their latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

SCALE: Final = 8
"""Pixels for each position of a latent, on a side."""
_SEED: Final = 7
_KL_CHANNELS: Final = (16, 16, 32, 32)
_WAN_CHANNELS: Final = 8
_BELOW_CLAMP: Final = 0.25  # of the last convolution; Wan cuts its samples off at ±1
_TILE: Final = 0.75  # of a latent's side: two tiles on each
_STRIDE: Final = 0.75  # of a tile's side


@dataclass(frozen=True)
class AutoencoderFamily:
    """One class of diffusers.

    Attributes:
        title: Its name.
        build: Makes the autoencoder.
        channels: Of a latent.
        tiles: Options of its tiling for a latent of this height and width, with 2 × 2 tiles.
    """

    title: str
    build: Callable[[], Any]
    channels: int
    tiles: Callable[[int, int], dict[str, int]]


def build_vae(family: str) -> Any:
    """An autoencoder with random weights, the same ones in every process."""
    torch.manual_seed(_SEED)
    return AUTOENCODERS[family].build().eval().requires_grad_(False)


def latent_of(family: str, batch: int, frames: int, height: int, width: int) -> Tensor:
    """A latent for samples of so many frames and pixels, the same one in every process."""
    generator = torch.Generator().manual_seed(_SEED)
    over_time = [] if family == "kl" else [1 + (frames - 1) // 4]
    shape = [batch, AUTOENCODERS[family].channels, *over_time, height // SCALE, width // SCALE]
    return torch.randn(shape, generator=generator)


def tile(vae: Any, family: str, latent: Tensor) -> None:
    """Turn on an autoencoder's own tiling, with 2 × 2 tiles of a latent."""
    vae.enable_tiling()
    for name, value in AUTOENCODERS[family].tiles(latent.shape[-2], latent.shape[-1]).items():
        setattr(vae, name, value)


def _kl() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(_KL_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(_KL_CHANNELS),
        block_out_channels=_KL_CHANNELS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def _kl_tiles(height: int, _: int) -> dict[str, int]:
    side = int(height * _TILE)  # its tiles are square, and overlap by a quarter
    return {"tile_latent_min_size": side, "tile_sample_min_size": side * SCALE}


def _wan() -> Any:
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(
        base_dim=_WAN_CHANNELS, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1
    )
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.mul_(_BELOW_CLAMP)
    return vae


def _wan_tiles(height: int, width: int) -> dict[str, int]:
    found = {}
    for name, length in (("height", height), ("width", width)):
        side = int(length * _TILE)
        found[f"tile_sample_min_{name}"] = side * SCALE
        found[f"tile_sample_stride_{name}"] = int(side * _STRIDE) * SCALE
    return found


AUTOENCODERS: Final = {
    "kl": AutoencoderFamily("AutoencoderKL", _kl, 4, _kl_tiles),
    "wan": AutoencoderFamily("AutoencoderKLWan", _wan, 16, _wan_tiles),
}
