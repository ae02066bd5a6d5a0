"""Pipelines that compute both branches of an image in one call of a transformer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")

TEXT = 24


def prompts(length: int = 7) -> dict[str, Any]:
    """Of one shape, as these pipelines demand; of different lengths where they take a mask."""
    return {
        "prompt_embeds": seeded(1, length, TEXT),
        "negative_prompt_embeds": seeded(1, length, TEXT, seed=1),
    }


def masks(length: int = 7) -> dict[str, Any]:
    return {
        "prompt_attention_mask": valid(length, length),
        "negative_prompt_attention_mask": valid(length, length - 3),
    }


def stable_diffusion_3() -> Any:
    return assembled(
        diffusers.StableDiffusion3Pipeline,
        transformer=sharpened(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                caption_projection_dim=32,
                pooled_projection_dim=12,
                pos_embed_max_size=12,
                qk_norm="rms_norm",
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def stable_diffusion_3_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=64,
        width=96,
        guidance_scale=5.0,
        pooled_prompt_embeds=seeded(1, 12, seed=2),
        negative_pooled_prompt_embeds=seeded(1, 12, seed=3),
        **prompts(),
    )


def skipped_layers_call(pipeline: Any) -> dict[str, Any]:
    """Two prompts; from the second step on, another call for one branch alone, of fewer layers."""
    return stable_diffusion_3_call(pipeline) | {
        "prompt_embeds": seeded(2, 7, TEXT),
        "negative_prompt_embeds": seeded(2, 7, TEXT, seed=1),
        "pooled_prompt_embeds": seeded(2, 12, seed=2),
        "negative_pooled_prompt_embeds": seeded(2, 12, seed=3),
        "skip_guidance_layers": [0],
        "skip_layer_guidance_stop": 1.0,
    }


def pixart(sample_size: int) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=96,
        sample_size=sample_size,
        caption_channels=TEXT,
        use_additional_conditions=sample_size == 128,
    )


def pixart_alpha() -> Any:
    """At this sample size it passes the resolution, within added_cond_kwargs."""
    return assembled(
        diffusers.PixArtAlphaPipeline,
        transformer=sharpened(lambda: pixart(128)),
        scheduler=quietly(diffusers.DPMSolverMultistepScheduler),
    )


def pixart_sigma() -> Any:
    return assembled(
        diffusers.PixArtSigmaPipeline,
        transformer=sharpened(lambda: pixart(8)),
        scheduler=quietly(diffusers.DPMSolverMultistepScheduler),
    )


def pixart_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=64,
        width=96,
        guidance_scale=4.5,
        negative_prompt=None,
        use_resolution_binning=False,
        **prompts(),
        **masks(),
    )


def aura_flow() -> Any:
    return assembled(
        diffusers.AuraFlowPipeline,
        transformer=sharpened(
            lambda: diffusers.AuraFlowTransformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=TEXT,
                caption_projection_dim=32,
                out_channels=4,
                pos_embed_max_size=64,
            ),
            strength=3.0,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def aura_flow_call(pipeline: Any) -> dict[str, Any]:
    return common(height=64, width=96, guidance_scale=3.5, **prompts(), **masks())


def hunyuan_dit() -> Any:
    """Its scheduler draws noise at every step."""
    return assembled(
        diffusers.HunyuanDiTPipeline,
        transformer=sharpened(
            lambda: diffusers.HunyuanDiT2DModel(
                num_attention_heads=4,
                attention_head_dim=16,
                in_channels=4,
                patch_size=2,
                sample_size=8,
                hidden_size=64,
                num_layers=2,
                mlp_ratio=2.0,
                cross_attention_dim=TEXT,
                cross_attention_dim_t5=16,
                pooled_projection_dim=16,
                text_len=7,
                text_len_t5=9,
            )
        ),
        scheduler=quietly(
            diffusers.DDPMScheduler, prediction_type="v_prediction", clip_sample=False
        ),
        requires_safety_checker=False,
    )


def hunyuan_dit_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=64,
        width=96,
        guidance_scale=5.0,
        guidance_rescale=0.5,
        prompt_embeds_2=seeded(1, 9, 16, seed=2),
        negative_prompt_embeds_2=seeded(1, 9, 16, seed=3),
        prompt_attention_mask_2=valid(9, 9),
        negative_prompt_attention_mask_2=valid(9, 4),
        use_resolution_binning=False,
        **prompts(),
        **masks(),
    )


def sana() -> Any:
    return assembled(
        diffusers.SanaPipeline,
        transformer=sharpened(
            lambda: diffusers.SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=16,
                num_layers=2,
                num_cross_attention_heads=4,
                cross_attention_head_dim=16,
                cross_attention_dim=64,
                caption_channels=TEXT,
                sample_size=8,
            )
        ),
        scheduler=quietly(
            diffusers.DPMSolverMultistepScheduler,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        ),
    )


def sana_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=128,
        width=192,
        guidance_scale=4.5,
        negative_prompt=None,
        use_resolution_binning=False,
        **prompts(),
        **masks(),
    )


CASES = {
    name: PipelineCase(name, "batch", build, arguments, calls)
    for name, build, arguments, calls in (
        ("Stable Diffusion 3", stable_diffusion_3, stable_diffusion_3_call, 1),
        ("Stable Diffusion 3, layers skipped", stable_diffusion_3, skipped_layers_call, 2),
        ("PixArt Alpha", pixart_alpha, pixart_call, 1),
        ("PixArt Sigma", pixart_sigma, pixart_call, 1),
        ("AuraFlow", aura_flow, aura_flow_call, 1),
        ("Hunyuan-DiT, rescaled", hunyuan_dit, hunyuan_dit_call, 1),
        ("Sana", sana, sana_call, 1),
    )
}
