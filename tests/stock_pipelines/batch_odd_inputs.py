"""Pipelines of images whose branches are not simply the halves of every input's first dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened, valid
from .unets import image_vae, unet

diffusers = pytest.importorskip("diffusers")

TEXT = 24


def z_image() -> Any:
    return assembled(
        diffusers.ZImagePipeline,
        transformer=sharpened(
            lambda: diffusers.ZImageTransformer2DModel(
                in_channels=16,
                dim=64,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=4,
                n_kv_heads=4,
                cap_feat_dim=TEXT,
                axes_dims=[4, 6, 6],
                axes_lens=[128, 32, 32],
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def z_image_call(pipeline: Any) -> dict[str, Any]:
    """Lists for two images, whose prompts and negative prompts are of four lengths."""
    return common(
        height=64,
        width=96,
        guidance_scale=4.0,
        prompt_embeds=[seeded(7, TEXT), seeded(40, TEXT, seed=1)],
        negative_prompt_embeds=[seeded(3, TEXT, seed=2), seeded(5, TEXT, seed=3)],
    )


def hidream() -> Any:
    """It scales every size to the area of its default one."""
    pipeline = assembled(
        diffusers.HiDreamImagePipeline,
        transformer=sharpened(
            lambda: diffusers.HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                caption_channels=[TEXT, 20],
                text_emb_dim=12,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=(4, 6, 6),
                max_resolution=(8, 8),
                llama_layers=[0, 1],
                force_inference_output=True,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.default_sample_size = 8
    return pipeline


def hidream_call(pipeline: Any) -> dict[str, Any]:
    """One of its inputs has the layers of a text encoder before the batch."""
    return common(
        height=64,
        width=64,
        guidance_scale=5.0,
        prompt_embeds_t5=seeded(1, 5, TEXT),
        negative_prompt_embeds_t5=seeded(1, 5, TEXT, seed=1),
        prompt_embeds_llama3=seeded(2, 1, 7, 20, seed=2),
        negative_prompt_embeds_llama3=seeded(2, 1, 7, 20, seed=3),
        pooled_prompt_embeds=seeded(1, 12, seed=4),
        negative_pooled_prompt_embeds=seeded(1, 12, seed=5),
    )


def ernie_image() -> Any:
    """It passes the lengths of the prompts, positive and negative, beside them."""
    return assembled(
        diffusers.ErnieImagePipeline,
        transformer=sharpened(
            lambda: diffusers.ErnieImageTransformer2DModel(
                hidden_size=64,
                num_attention_heads=4,
                num_layers=2,
                ffn_hidden_size=96,
                in_channels=8,
                out_channels=8,
                text_in_dim=TEXT,
                rope_axes_dim=(4, 6, 6),
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def ernie_image_call(pipeline: Any) -> dict[str, Any]:
    """Of two images, whose prompts and negative prompts are of four lengths."""
    return common(
        height=64,
        width=96,
        guidance_scale=4.0,
        prompt_embeds=[seeded(7, TEXT), seeded(9, TEXT, seed=1)],
        negative_prompt_embeds=[seeded(3, TEXT, seed=2), seeded(5, TEXT, seed=3)],
        negative_prompt=["", ""],
    )


def lumina() -> Any:
    """It has the positive branch first, and guides only some of the channels."""
    return assembled(
        diffusers.LuminaPipeline,
        transformer=sharpened(
            lambda: diffusers.LuminaNextDiT2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                hidden_size=64,
                num_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                multiple_of=16,
                cross_attention_dim=TEXT,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=64,
        width=96,
        guidance_scale=4.0,
        prompt_embeds=seeded(1, 7, TEXT),
        prompt_attention_mask=valid(7, 7),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
        negative_prompt_attention_mask=valid(7, 4),
    )


def animate_diff() -> Any:
    """The rows of the text are those of every frame."""
    return assembled(
        diffusers.AnimateDiffPipeline,
        vae=sharpened(image_vae),
        unet=sharpened(lambda: unet(cross_attention_dim=TEXT)),
        motion_adapter=sharpened(
            lambda: diffusers.MotionAdapter(
                block_out_channels=(16, 32),
                motion_layers_per_block=1,
                motion_norm_num_groups=4,
                motion_num_attention_heads=4,
            )
        ),
        scheduler=quietly(diffusers.DDIMScheduler, clip_sample=False),
    )


def animate_diff_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=16,
        width=24,
        num_frames=3,
        guidance_scale=5.0,
        prompt_embeds=seeded(1, 7, TEXT),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
    )


def controlled_stable_diffusion() -> Any:
    """Its ControlNet, which is no denoiser, makes tensors of both branches for the UNet."""
    return assembled(
        diffusers.StableDiffusionControlNetPipeline,
        vae=sharpened(image_vae),
        unet=sharpened(lambda: unet(cross_attention_dim=TEXT)),
        controlnet=sharpened(
            lambda: diffusers.ControlNetModel(
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                attention_head_dim=4,
                cross_attention_dim=TEXT,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                conditioning_embedding_out_channels=(8, 8),
            )
        ),
        scheduler=quietly(diffusers.DDIMScheduler, clip_sample=False),
        requires_safety_checker=False,
    )


def controlled_stable_diffusion_call(pipeline: Any) -> dict[str, Any]:
    return common(
        image=torch.sigmoid(seeded(1, 3, 16, 24, seed=4)),
        guidance_scale=5.0,
        prompt_embeds=seeded(1, 7, TEXT),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
    )


CASES = {
    name: PipelineCase(name, "batch", build, arguments, 1, (denoiser,))
    for name, build, arguments, denoiser in (
        ("Z-Image", z_image, z_image_call, "transformer"),
        ("HiDream", hidream, hidream_call, "transformer"),
        ("ERNIE-Image", ernie_image, ernie_image_call, "transformer"),
        ("Lumina", lumina, lumina_call, "transformer"),
        ("AnimateDiff", animate_diff, animate_diff_call, "unet"),
        ("ControlNet", controlled_stable_diffusion, controlled_stable_diffusion_call, "unet"),
    )
}
