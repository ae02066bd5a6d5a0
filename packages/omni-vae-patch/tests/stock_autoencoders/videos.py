"""The other autoencoders of videos: each decodes all of its frames at once."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from .autoencoder_case import AutoencoderCase, randomised, seeded, video_case

diffusers = pytest.importorskip("diffusers")


def mochi() -> nn.Module:
    """Its norms have 32 groups."""
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 64),
        decoder_block_out_channels=(32, 32, 64),
        latent_channels=4,
        layers_per_block=(1, 1, 1, 1),
        temporal_expansions=(1, 2),
        spatial_expansions=(2, 2),
        add_attention_block=(False, True, True, True),
    )


def cosmos() -> nn.Module:
    """Images enter it, and leave it, as wavelets."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 16, 16, 16),
        decode_block_out_channels=(8, 16, 16, 16, 16),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=8,
        latents_mean=None,
        latents_std=None,
    )


def temporal_decoder() -> nn.Module:
    """The one of Stable Video Diffusion; its norms have 32 groups."""
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
    )


FRAMES = 3


def of_frames(height: int, width: int, seed: int) -> Tensor:
    """The frames of a video as a batch of latents."""
    return seeded(FRAMES, 4, height, width, seed=seed)


def frames(height: int, width: int, seed: int) -> Tensor:
    """The frames of a video as a batch of images."""
    return seeded(FRAMES, 3, height * 4, width * 4, seed=seed)


CASES: dict[str, AutoencoderCase] = {
    case.name: case
    for case in (
        video_case("mochi", mochi, 4, 4, (3, 5)),
        video_case("cosmos", cosmos, 4, 8, (3, 17)),
        AutoencoderCase(
            name="temporal-decoder",
            build=lambda: randomised(temporal_decoder),
            latent=of_frames,
            sample=frames,
            is_video=True,
            scale=4,
        ),
    )
}
