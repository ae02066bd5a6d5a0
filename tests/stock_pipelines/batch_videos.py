"""Pipelines that compute both branches of a video in one call of a transformer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")

TEXT = 24


def prompts(length: int = 7, width: int = TEXT) -> dict[str, Any]:
    """Of one shape, as these pipelines demand."""
    return {
        "prompt_embeds": seeded(1, length, width),
        "negative_prompt_embeds": seeded(1, length, width, seed=1),
    }


def masked_prompts(length: int = 7, width: int = TEXT) -> dict[str, Any]:
    """The same, of which the negative one has fewer tokens that count."""
    return prompts(length, width) | {
        "prompt_attention_mask": valid(length, length),
        "negative_prompt_attention_mask": valid(length, length - 3),
    }


def cogvideox(scheduler: Any = None) -> Any:
    return assembled(
        diffusers.CogVideoXPipeline,
        transformer=sharpened(
            lambda: diffusers.CogVideoXTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=8,
                text_embed_dim=TEXT,
                num_layers=2,
                sample_width=8,
                sample_height=8,
                sample_frames=9,
                max_text_seq_length=7,
                use_rotary_positional_embeddings=True,
            )
        ),
        scheduler=scheduler or quietly(diffusers.CogVideoXDDIMScheduler),
    )


def stochastic_cogvideox() -> Any:
    """Its scheduler draws noise, and remembers what the step before predicted."""
    return cogvideox(quietly(diffusers.CogVideoXDPMScheduler))


def cogvideox_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=48,
        width=64,
        num_frames=9,
        guidance_scale=6.0,
        use_dynamic_cfg=True,
        **prompts(),
    )


def mochi() -> Any:
    return assembled(
        diffusers.MochiPipeline,
        transformer=sharpened(
            lambda: diffusers.MochiTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=16,
                num_layers=2,
                pooled_projection_dim=32,
                in_channels=4,
                text_embed_dim=TEXT,
                time_embed_dim=8,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


def mochi_call(pipeline: Any) -> dict[str, Any]:
    return common(height=48, width=64, num_frames=13, guidance_scale=4.5, **masked_prompts())


def ltx() -> Any:
    return assembled(
        diffusers.LTXPipeline,
        transformer=sharpened(
            lambda: diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=4,
                attention_head_dim=16,
                cross_attention_dim=64,
                num_layers=2,
                caption_channels=TEXT,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def ltx_call(pipeline: Any) -> dict[str, Any]:
    """Of two prompts, with guidance rescaled."""
    two = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in masked_prompts().items()
    }
    two["prompt_embeds"] = seeded(2, 7, TEXT)
    return common(
        height=96,
        width=128,
        num_frames=17,
        guidance_scale=3.0,
        guidance_rescale=0.5,
        **two,
    )


def allegro() -> Any:
    return assembled(
        diffusers.AllegroPipeline,
        transformer=sharpened(
            lambda: diffusers.AllegroTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=24,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                cross_attention_dim=96,
                sample_width=8,
                sample_height=8,
                sample_frames=8,
                caption_channels=TEXT,
            )
        ),
        scheduler=quietly(diffusers.EulerAncestralDiscreteScheduler),
    )


def allegro_call(pipeline: Any) -> dict[str, Any]:
    return common(
        height=48,
        width=64,
        num_frames=8,
        guidance_scale=7.5,
        negative_prompt=None,
        **masked_prompts(),
    )


def ltx2_transformer() -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT,
        perturbed_attn=True,
    )


def ltx2_connectors() -> nn.Module:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    return LTX2TextConnectors(
        caption_channels=TEXT,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=6,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=6,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )


def ltx2_vae() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    )


def ltx2_audio_vae() -> nn.Module:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, num_res_blocks=1, latent_channels=2, mel_bins=16
    )


def ltx2() -> Any:
    return assembled(
        diffusers.LTX2Pipeline,
        transformer=sharpened(ltx2_transformer),
        connectors=sharpened(ltx2_connectors),
        vae=sharpened(ltx2_vae),
        audio_vae=sharpened(ltx2_audio_vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def ltx2_call(pipeline: Any) -> dict[str, Any]:
    """Of video and audio, both guided."""
    return common(
        height=192,
        width=256,
        num_frames=33,
        frame_rate=24.0,
        guidance_scale=3.0,
        audio_guidance_scale=5.0,
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        **masked_prompts(width=2 * TEXT),
    )


def perturbed_ltx2_call(pipeline: Any) -> dict[str, Any]:
    """With two more calls in each step, of one branch each: with perturbed attention, and alone."""
    return ltx2_call(pipeline) | {
        "stg_scale": 1.0,
        "audio_stg_scale": 1.0,
        "modality_scale": 3.0,
        "audio_modality_scale": 3.0,
        "spatio_temporal_guidance_blocks": [1],
    }


CASES = {
    name: PipelineCase(name, "batch", build, arguments, calls)
    for name, build, arguments, calls in (
        ("CogVideoX", cogvideox, cogvideox_call, 1),
        ("CogVideoX, stochastic", stochastic_cogvideox, cogvideox_call, 1),
        ("Mochi", mochi, mochi_call, 1),
        ("LTX-Video, rescaled", ltx, ltx_call, 1),
        ("Allegro", allegro, allegro_call, 1),
        ("LTX-2", ltx2, ltx2_call, 1),
        ("LTX-2, four branches", ltx2, perturbed_ltx2_call, 3),
    )
}
