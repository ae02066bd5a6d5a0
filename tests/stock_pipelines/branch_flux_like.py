"""Pipelines of images in the manner of Flux, which call the transformer for each branch."""

from __future__ import annotations

from typing import Any

import pytest

from .pipeline_case import PipelineCase, assembled, common, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")

TEXT = 24
SIZE = {"height": 64, "width": 96}


def prompts(positive: int = 7, negative: int = 4) -> dict[str, Any]:
    """Of two lengths, as each branch has a call of its own."""
    return {
        "prompt_embeds": seeded(1, positive, TEXT),
        "negative_prompt_embeds": seeded(1, negative, TEXT, seed=1),
    }


def shifted() -> Any:
    """The scheduler that most of these pipelines come with."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def flux() -> Any:
    return assembled(
        diffusers.FluxPipeline,
        transformer=sharpened(
            lambda: diffusers.FluxTransformer2DModel(
                in_channels=8,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                pooled_projection_dim=20,
                axes_dims_rope=(4, 6, 6),
                guidance_embeds=True,
            ),
            strength=2.0,
        ),
        scheduler=shifted(),
    )


def flux_call(pipeline: Any) -> dict[str, Any]:
    """With guidance that is embedded as well as guidance by a negative prompt."""
    return common(
        true_cfg_scale=3.0,
        pooled_prompt_embeds=seeded(1, 20, seed=2),
        negative_pooled_prompt_embeds=seeded(1, 20, seed=3),
        **SIZE,
        **prompts(7, 7),
    )


def qwen_image() -> Any:
    return assembled(
        diffusers.QwenImagePipeline,
        transformer=sharpened(
            lambda: diffusers.QwenImageTransformer2DModel(
                in_channels=8,
                out_channels=2,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        scheduler=shifted(),
    )


def qwen_image_call(pipeline: Any) -> dict[str, Any]:
    return common(
        true_cfg_scale=4.0,
        prompt_embeds_mask=valid(7, 7),
        negative_prompt_embeds_mask=valid(4, 3),
        **SIZE,
        **prompts(),
    )


def chroma() -> Any:
    return assembled(
        diffusers.ChromaPipeline,
        transformer=sharpened(
            lambda: diffusers.ChromaTransformer2DModel(
                in_channels=8,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                axes_dims_rope=(4, 6, 6),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            strength=2.0,
        ),
        scheduler=shifted(),
    )


def chroma_call(pipeline: Any) -> dict[str, Any]:
    return common(
        guidance_scale=4.0,
        prompt_attention_mask=valid(7, 6).bool(),
        negative_prompt_attention_mask=valid(4, 3).bool(),
        **SIZE,
        **prompts(),
    )


def flux2_klein() -> Any:
    return assembled(
        diffusers.Flux2KleinPipeline,
        transformer=sharpened(
            lambda: diffusers.Flux2Transformer2DModel(
                in_channels=8,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            )
        ),
        scheduler=shifted(),
        vae=sharpened(flux2_vae),
    )


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        layers_per_block=1,
        norm_num_groups=4,
    )


def flux2_klein_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=4.0, height=16, width=24, **prompts())


def ovis_image() -> Any:
    return assembled(
        diffusers.OvisImagePipeline,
        transformer=sharpened(
            lambda: diffusers.OvisImageTransformer2DModel(
                in_channels=16,
                out_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                axes_dims_rope=(4, 6, 6),
            )
        ),
        scheduler=shifted(),
    )


def ovis_image_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=5.0, negative_prompt=None, **SIZE, **prompts())


CASES = {
    name: PipelineCase(name, "branches", build, arguments, 2)
    for name, build, arguments in (
        ("Flux", flux, flux_call),
        ("Qwen-Image", qwen_image, qwen_image_call),
        ("Chroma", chroma, chroma_call),
        ("Flux 2 Klein", flux2_klein, flux2_klein_call),
        ("Ovis-Image", ovis_image, ovis_image_call),
    )
}
