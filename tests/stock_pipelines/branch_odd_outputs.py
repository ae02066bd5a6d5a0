"""Pipelines that do more with a branch's output than combine it with the other one's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .branch_flux_like import flux, flux_call
from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened

diffusers = pytest.importorskip("diffusers")

TEXT = 24


def prompts(positive: int = 7, negative: int = 4) -> dict[str, Any]:
    """Of two lengths, as each branch has a call of its own."""
    return {
        "prompt_embeds": seeded(1, positive, TEXT),
        "negative_prompt_embeds": seeded(1, negative, TEXT, seed=1),
    }


class NothingIsUnsafe:
    """In place of the checker that the Cosmos pipelines demand."""

    def to(self, device: Any) -> NothingIsUnsafe:
        return self


def cosmos_transformer() -> nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2.0,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # to do so takes torchvision
    )


def cosmos() -> Any:
    """It takes the outputs of both branches through its scheduler, as a batch, to combine them."""
    return assembled(
        diffusers.CosmosTextToWorldPipeline,
        transformer=sharpened(cosmos_transformer),
        scheduler=quietly(
            diffusers.EDMEulerScheduler, sigma_min=0.002, sigma_max=80, sigma_data=0.5
        ),
        safety_checker=NothingIsUnsafe(),
    )


def cosmos_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=7.0, fps=30, height=48, width=64, num_frames=9, **prompts())


def cosmos_2() -> Any:
    """It scales the first branch's output, and adds it to the latents, before the second call."""
    return assembled(
        diffusers.Cosmos2TextToImagePipeline,
        transformer=sharpened(cosmos_transformer),
        scheduler=quietly(diffusers.FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True),
        safety_checker=NothingIsUnsafe(),
    )


def cosmos_2_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=7.0, height=64, width=96, **prompts())


def flux_kontext() -> Any:
    """It takes a slice of each branch's output: the rest is of the image that it is given."""
    pipeline = flux()
    return assembled(
        diffusers.FluxKontextPipeline,
        transformer=pipeline.transformer,
        scheduler=pipeline.scheduler,
        vae=sharpened(flux_vae),
    )


def flux_vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        shift_factor=0.1,
    )


def flux_kontext_call(pipeline: Any) -> dict[str, Any]:
    return flux_call(pipeline) | {
        "image": torch.sigmoid(seeded(1, 3, 16, 24, seed=4)),
        "height": 16,
        "width": 24,
        "max_area": 16 * 24,
        "_auto_resize": False,
    }


def kandinsky6() -> Any:
    """Its transformer returns a tuple of video and audio, of which both are guided."""
    return assembled(
        diffusers.Kandinsky6TI2VAPipeline,
        transformer=sharpened(
            lambda: diffusers.Kandinsky6Transformer3DModel(
                in_visual_dim=4,
                out_visual_dim=4,
                in_text_dim=TEXT,
                in_text_dim2=12,
                time_dim=16,
                model_dim=64,
                ff_dim=64,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 6, 6),
                in_audio_dim=6,
                out_audio_dim=6,
                model_dim_a=32,
                time_dim_a=16,
                ff_dim_a=32,
                axes_dims_a=(8,),
            )
        ),
        audio_vae=sharpened(
            lambda: diffusers.MMAudioVAE(mel_bins=8, latent_channels=6, hidden_channels=8)
        ),
        vocoder=sharpened(
            lambda: diffusers.MMAudioVocoder(
                num_mels=8,
                upsample_initial_channel=8,
                upsample_rates=(2,),
                upsample_kernel_sizes=(4,),
                resblock_kernel_sizes=(3,),
                resblock_dilation_sizes=((1,),),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def kandinsky6_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=48,
        width=64,
        num_frames=9,
        guidance_scale=5.0,
        pooled_prompt_embeds=seeded(1, 12, seed=2),
        negative_pooled_prompt_embeds=seeded(1, 12, seed=3),
        **prompts(),
    )


CASES = {
    name: PipelineCase(name, "branches", build, arguments, 2)
    for name, build, arguments in (
        ("Cosmos", cosmos, cosmos_call),
        ("Cosmos 2", cosmos_2, cosmos_2_call),
        ("Flux Kontext", flux_kontext, flux_kontext_call),
        ("Kandinsky 6", kandinsky6, kandinsky6_call),
    )
}
