"""Pipelines of UNets: every branch in one batch, in one case three of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened

diffusers = pytest.importorskip("diffusers")

TEXT = 32


def image_vae() -> nn.Module:
    """One that halves height and width."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def unet(**options: Any) -> nn.Module:
    """The attention_head_dim of this class is the number of heads."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "attention_head_dim": 4,
            "cross_attention_dim": TEXT,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        | options
    )


def stable_diffusion(scheduler: Any = None) -> Any:
    return assembled(
        diffusers.StableDiffusionPipeline,
        vae=sharpened(image_vae),
        unet=sharpened(unet),
        scheduler=scheduler or quietly(diffusers.DDIMScheduler, clip_sample=False),
        requires_safety_checker=False,
    )


def stochastic_stable_diffusion() -> Any:
    """Its scheduler draws noise at every step."""
    return stable_diffusion(quietly(diffusers.EulerAncestralDiscreteScheduler))


def stable_diffusion_call(pipeline: Any, **more: Any) -> dict[str, Any]:
    return common(
        height=16,
        width=24,
        guidance_scale=5.0,
        prompt_embeds=seeded(1, 7, TEXT),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
        **more,
    )


def decoded_call(pipeline: Any) -> dict[str, Any]:
    """Two images for the prompt, decoded."""
    return stable_diffusion_call(pipeline, num_images_per_prompt=2) | {"output_type": "pt"}


def stable_diffusion_xl() -> Any:
    return assembled(
        diffusers.StableDiffusionXLPipeline,
        vae=sharpened(image_vae),
        unet=sharpened(
            lambda: unet(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=12 + 6 * 8,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
            )
        ),
        scheduler=quietly(diffusers.EulerDiscreteScheduler),
        add_watermarker=False,
    )


def stable_diffusion_xl_call(pipeline: Any) -> dict[str, Any]:
    """With the sizes that the negative prompt is to avoid, and guidance rescaled."""
    return stable_diffusion_call(
        pipeline,
        pooled_prompt_embeds=seeded(1, 12, seed=2),
        negative_pooled_prompt_embeds=seeded(1, 12, seed=3),
        negative_original_size=(4, 4),
        negative_target_size=(16, 24),
        guidance_rescale=0.7,
    )


def instruct_pix2pix() -> Any:
    return assembled(
        diffusers.StableDiffusionInstructPix2PixPipeline,
        vae=sharpened(image_vae),
        unet=sharpened(lambda: unet(in_channels=8)),
        scheduler=quietly(diffusers.EulerAncestralDiscreteScheduler),
        requires_safety_checker=False,
    )


def instruct_pix2pix_call(pipeline: Any) -> dict[str, Any]:
    return common(
        image=torch.sigmoid(seeded(1, 3, 16, 24, seed=4)),
        guidance_scale=5.0,
        image_guidance_scale=2.0,
        prompt_embeds=seeded(1, 7, TEXT),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
    )


def kandinsky() -> Any:
    """Its UNet has no text: it is guided by embeddings of images, within added_cond_kwargs."""
    return assembled(
        diffusers.KandinskyV22Pipeline,
        unet=sharpened(
            lambda: unet(
                out_channels=8,
                block_out_channels=(32, 64),
                norm_num_groups=32,
                attention_head_dim=8,
                encoder_hid_dim=20,
                encoder_hid_dim_type="image_proj",
                addition_embed_type="image",
                addition_embed_type_num_heads=4,
                time_embedding_dim=16,
                resnet_time_scale_shift="scale_shift",
                class_embed_type=None,
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            )
        ),
        scheduler=quietly(
            diffusers.DDPMScheduler, variance_type="learned_range", clip_sample=False
        ),
        movq=sharpened(movq),
    )


def movq() -> nn.Module:
    return diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def kandinsky_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=32,
        width=32,
        guidance_scale=4.0,
        image_embeds=seeded(1, 20),
        negative_image_embeds=seeded(1, 20, seed=1),
    )


CASES = {
    case.name: case
    for case in (
        PipelineCase(
            "Stable Diffusion", "batch", stable_diffusion, stable_diffusion_call, 1, ("unet",)
        ),
        PipelineCase(
            "Stable Diffusion, stochastic",
            "batch",
            stochastic_stable_diffusion,
            stable_diffusion_call,
            1,
            ("unet",),
        ),
        PipelineCase(
            "Stable Diffusion, two images decoded",
            "batch",
            stable_diffusion,
            decoded_call,
            1,
            ("unet",),
        ),
        PipelineCase(
            "Stable Diffusion XL, rescaled",
            "batch",
            stable_diffusion_xl,
            stable_diffusion_xl_call,
            1,
            ("unet",),
        ),
        PipelineCase(
            "Instruct Pix2Pix, three branches",
            "batch",
            instruct_pix2pix,
            instruct_pix2pix_call,
            1,
            ("unet",),
        ),
        PipelineCase("Kandinsky 2.2", "batch", kandinsky, kandinsky_call, 1, ("unet",)),
    )
}
