"""Autoencoders that make a video in steps of a few frames, between which they keep features."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .autoencoder_case import AutoencoderCase, video_case

diffusers = pytest.importorskip("diffusers")


def wan() -> nn.Module:
    """The one of Wan 2.1."""
    return diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)


def patched_wan() -> nn.Module:
    """As that of Wan 2.1, of images that are cut into patches."""
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2
    )


def residual_wan() -> nn.Module:
    """The one of Wan 2.2: resized on a second path too, and images cut into patches."""
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=24,
        num_res_blocks=1,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=16,
    )


def qwen_image() -> nn.Module:
    return diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)


def cogvideox() -> nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=96,
        sample_width=96,
    )


def magvit(**more: Any) -> nn.Module:
    """The one of EasyAnimate, whose convolutions keep the last frames they have seen."""
    return diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        **more,
    )


def norms_of_frames() -> nn.Module:
    return magvit(spatial_group_norm=True)


def norms_of_clips() -> nn.Module:
    return magvit(spatial_group_norm=False)


CASES: dict[str, AutoencoderCase] = {
    case.name: case
    for case in (
        video_case("wan-2.1", wan, 16, 8, (3, 9), quiet=0.25),
        video_case("wan-patched", patched_wan, 16, 16, (3, 9), quiet=0.25),
        video_case("wan-2.2", residual_wan, 24, 16, (3, 9), quiet=0.25),
        video_case("qwen-image", qwen_image, 16, 8, (3, 9), quiet=0.25),
        video_case("cogvideox", cogvideox, 4, 4, (5, 17)),
        video_case("magvit", norms_of_frames, 4, 8, (3, 9)),
        video_case("magvit-clip-norms", norms_of_clips, 4, 8, (3, 9)),
    )
}
