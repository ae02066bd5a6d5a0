"""Autoencoders of the LTX family, without attention, some with noise or a timestep."""

from __future__ import annotations

import pytest
from torch import nn

from .autoencoder_case import AutoencoderCase, video_case

diffusers = pytest.importorskip("diffusers")


def ltx_video() -> nn.Module:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        decoder_block_out_channels=(8, 16, 16),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False, False, False, False),
        upsample_residual=(False, False, False),
        upsample_factor=(1, 1, 1),
        downsample_type=("conv", "conv", "conv"),
        patch_size=2,
    )


def ltx_video_091() -> nn.Module:
    """Its decoder is given a timestep, and adds noise of the size of the picture."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("LTXVideoDownBlock3D",) * 3,
        decoder_block_out_channels=(16, 32),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True, False),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(True, True, False),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        downsample_type=("conv", "conv", "conv"),
        timestep_conditioning=True,
        patch_size=2,
    )


def ltx_video_095() -> nn.Module:
    """Downsampled with residuals, each kind in turn; here with a causal decoder."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("LTXVideo095DownBlock3D",) * 3,
        decoder_block_out_channels=(16, 32),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        downsample_type=("spatial", "temporal", "spatiotemporal"),
        timestep_conditioning=True,
        patch_size=2,
        decoder_causal=True,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )


def ltx2_video(**more: object) -> nn.Module:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("LTX2VideoDownBlock3D",) * 3,
        decoder_block_out_channels=(16, 32),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True),
        upsample_type=("spatiotemporal", "spatiotemporal"),
        downsample_type=("spatial", "temporal", "spatiotemporal"),
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        patch_size=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        **more,
    )


def reflecting() -> nn.Module:
    """As it is by default: its decoder pads by reflection, its encoder by zeros."""
    return ltx2_video(decoder_inject_noise=(False, False, False))


def noisy() -> nn.Module:
    """The other way round, not causal, with timestep and noise."""
    return ltx2_video(
        decoder_inject_noise=(False, True, True),
        timestep_conditioning=True,
        decoder_causal=False,
        encoder_spatial_padding_mode="reflect",
        decoder_spatial_padding_mode="zeros",
    )


CASES: dict[str, AutoencoderCase] = {
    case.name: case
    for case in (
        video_case("ltx-video", ltx_video, 8, 8, (3, 9)),
        video_case("ltx-video-0.9.1", ltx_video_091, 8, 8, (3, 9)),
        video_case("ltx-video-0.9.5", ltx_video_095, 8, 8, (3, 9)),
        video_case("ltx2-video", reflecting, 8, 8, (3, 9)),
        video_case("ltx2-video-noisy", noisy, 8, 8, (3, 9)),
    )
}
