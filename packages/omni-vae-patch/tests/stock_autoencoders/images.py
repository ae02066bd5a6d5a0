"""Autoencoders of single images."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .autoencoder_case import AutoencoderCase, image_case

diffusers = pytest.importorskip("diffusers")


def autoencoder_kl(widths: tuple[int, ...], **more: Any) -> nn.Module:
    """AutoencoderKL with a level for each width."""
    options = {"latent_channels": 4, "norm_num_groups": 4, "sample_size": 64} | more
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        **options,
    )


def plain() -> nn.Module:
    return autoencoder_kl((8, 16, 16))


def without_attention() -> nn.Module:
    """Nor the convolutions between encoder, latent and decoder."""
    return autoencoder_kl(
        (8, 16, 16),
        latent_channels=16,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )


def sdxl() -> nn.Module:
    return autoencoder_kl(
        (8, 16, 16, 16), layers_per_block=2, force_upcast=True, scaling_factor=0.13025
    )


def five_levels() -> nn.Module:
    return autoencoder_kl((8, 8, 8, 16, 16), force_upcast=False)


def flux2() -> nn.Module:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 16, 16, 24),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
    )


def hunyuan_image() -> nn.Module:
    """Its norms have 32 groups; its blocks fail where the downsampling does not match widths."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=64,
    )


def deep_compression(**more: Any) -> nn.Module:
    """AutoencoderDC, the one of SANA, with linear attention in its lower levels."""
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=16,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32, 64),
        decoder_block_out_channels=(16, 32, 64),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        **more,
    )


def shuffling() -> nn.Module:
    return deep_compression(encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 2))


def interpolating() -> nn.Module:
    """Resized by strided convolutions and interpolation; the first and last level are bare."""
    return deep_compression(
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
    )


def tiny() -> nn.Module:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


CASES: dict[str, AutoencoderCase] = {
    case.name: case
    for case in (
        image_case("kl", plain, 4, 4),
        image_case("kl-no-attention", without_attention, 16, 4),
        image_case("kl-sdxl", sdxl, 4, 8),
        image_case("kl-five-levels", five_levels, 4, 16),
        image_case("flux2", flux2, 8, 8),
        image_case("hunyuan-image", hunyuan_image, 8, 4),
        image_case("dc", shuffling, 8, 4),
        image_case("dc-interpolating", interpolating, 8, 4),
        image_case("tiny", tiny, 4, 4),
    )
}
