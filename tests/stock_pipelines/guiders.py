"""Pipelines in which a guider says how many branches there are, and combines them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .pipeline_case import PipelineCase, assembled, common, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")

TEXT = 24


def video_transformer() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
    )


def video_vae() -> nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )


def hunyuan_video_15(guider: Any) -> Any:
    return assembled(
        diffusers.HunyuanVideo15Pipeline,
        transformer=sharpened(video_transformer),
        vae=sharpened(video_vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=guider,
    )


def guided_video() -> Any:
    """With guidance rescaled."""
    return hunyuan_video_15(
        diffusers.ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.5)
    )


def partly_guided_video() -> Any:
    """Its first step has one branch."""
    return hunyuan_video_15(diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.34))


def projected_video() -> Any:
    """Its guider remembers the step before."""
    return hunyuan_video_15(
        diffusers.AdaptiveProjectedGuidance(
            guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5
        )
    )


def video_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=64,
        width=96,
        num_frames=9,
        prompt_embeds=seeded(1, 7, TEXT),
        prompt_embeds_mask=valid(7, 6),
        prompt_embeds_2=seeded(1, 5, 12, seed=2),
        prompt_embeds_mask_2=valid(5, 4),
        negative_prompt_embeds=seeded(1, 4, TEXT, seed=1),
        negative_prompt_embeds_mask=valid(4, 3),
        negative_prompt_embeds_2=seeded(1, 3, 12, seed=3),
        negative_prompt_embeds_mask_2=valid(3, 2),
    )


def image_transformer() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=12,
        rope_axes_dim=(8, 8),
    )


def hunyuan_image(guider: Any) -> Any:
    return assembled(
        diffusers.HunyuanImagePipeline,
        transformer=sharpened(image_transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        ocr_guider=guider,
        guider=guider,
    )


def image_with_layers_skipped() -> Any:
    """From its second step on it has a third branch, of fewer layers.

    The guider hooks the transformer before that call, and takes the hooks off after it.
    """
    return hunyuan_image(
        diffusers.SkipLayerGuidance(
            guidance_scale=4.0,
            skip_layer_guidance_scale=2.0,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
            skip_layer_config=diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
        )
    )


def image_with_layers_skipped_once() -> Any:
    """It has three branches in the second step, and two in the others."""
    pipeline = image_with_layers_skipped()
    pipeline.ocr_guider.skip_layer_guidance_stop = 0.67
    return pipeline


def image_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=128,
        width=192,
        prompt_embeds=seeded(1, 7, TEXT),
        prompt_embeds_mask=valid(7, 6),
        prompt_embeds_2=seeded(1, 5, 12, seed=2),
        prompt_embeds_mask_2=valid(5, 4),
        negative_prompt_embeds=seeded(1, 4, TEXT, seed=1),
        negative_prompt_embeds_mask=valid(4, 3),
        negative_prompt_embeds_2=seeded(1, 3, 12, seed=3),
        negative_prompt_embeds_mask_2=valid(3, 2),
    )


def motif_video() -> Any:
    """It clones each branch's output."""
    return assembled(
        diffusers.MotifVideoPipeline,
        transformer=sharpened(
            lambda: diffusers.MotifVideoTransformer3DModel(
                in_channels=9,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=2,
                num_decoder_layers=1,
                text_embed_dim=TEXT,
                rope_axes_dim=(4, 6, 6),
            ),
            strength=2.0,
        ),
        vae=sharpened(
            lambda: diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1])
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
    )


def motif_video_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=48,
        width=64,
        num_frames=9,
        prompt_embeds=seeded(1, 7, TEXT),
        prompt_attention_mask=valid(7, 7),
        negative_prompt_embeds=seeded(1, 7, TEXT, seed=1),
        negative_prompt_attention_mask=valid(7, 4),
    )


CASES = {
    name: PipelineCase(name, "branches", build, arguments, calls)
    for name, build, arguments, calls in (
        ("HunyuanVideo 1.5, rescaled", guided_video, video_call, 2),
        ("HunyuanVideo 1.5, partly guided", partly_guided_video, video_call, 2),
        ("HunyuanVideo 1.5, projected", projected_video, video_call, 2),
        ("HunyuanImage, three branches", image_with_layers_skipped, image_call, 3),
        ("HunyuanImage, three branches once", image_with_layers_skipped_once, image_call, 3),
        ("Motif-Video", motif_video, motif_video_call, 2),
    )
}
