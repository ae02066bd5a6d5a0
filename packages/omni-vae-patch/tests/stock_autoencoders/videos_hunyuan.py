"""Autoencoders of the Hunyuan family, whose attention sees all frames at once."""

from __future__ import annotations

import pytest
from torch import nn

from .autoencoder_case import AutoencoderCase, video_case

diffusers = pytest.importorskip("diffusers")


def hunyuan_video() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )


def hunyuan_video_15() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def hunyuan_image_refiner() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


CASES: dict[str, AutoencoderCase] = {
    case.name: case
    for case in (
        video_case("hunyuan-video", hunyuan_video, 4, 8, (3, 9)),
        video_case("hunyuan-video-tiles-of-time", hunyuan_video, 4, 8, (5, 17)),
        video_case("hunyuan-video-1.5", hunyuan_video_15, 4, 8, (3, 9)),
        video_case("hunyuan-image-refiner", hunyuan_image_refiner, 4, 8, (3, 3)),
    )
}
