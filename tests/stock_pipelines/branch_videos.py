"""Pipelines of videos that call their transformer once for each branch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from .pipeline_case import PipelineCase, assembled, common, quietly, seeded, sharpened, valid

diffusers = pytest.importorskip("diffusers")

TEXT = 24
SIZE = {"height": 48, "width": 64, "num_frames": 9}


def prompts(positive: int = 7, negative: int = 4) -> dict[str, Any]:
    """Of two lengths, as each branch has a call of its own."""
    return {
        "prompt_embeds": seeded(1, positive, TEXT),
        "negative_prompt_embeds": seeded(1, negative, TEXT, seed=1),
    }


def wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def flow_unipc() -> Any:
    return quietly(
        diffusers.UniPCMultistepScheduler,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )


def wan() -> Any:
    return assembled(
        diffusers.WanPipeline,
        transformer=sharpened(wan_transformer),
        scheduler=flow_unipc(),
    )


def wan_call(pipeline: Any) -> dict[str, Any]:
    return common(guidance_scale=5.0, **SIZE, **prompts())


def wan_of_two_experts() -> Any:
    """As Wan 2.2: the steps of less noise are another transformer's."""
    return assembled(
        diffusers.WanPipeline,
        transformer=sharpened(wan_transformer),
        transformer_2=sharpened(wan_transformer, seed=8),
        boundary_ratio=0.9,
        scheduler=flow_unipc(),
    )


def wan_of_two_experts_call(pipeline: Any) -> dict[str, Any]:
    return wan_call(pipeline) | {"guidance_scale_2": 3.0}


def wan_of_tokens_times() -> Any:
    """As Wan 2.2 of 5 billion parameters: every token has its timestep."""
    return assembled(
        diffusers.WanPipeline,
        transformer=sharpened(wan_transformer),
        expand_timesteps=True,
        scheduler=flow_unipc(),
    )


def sky_reels() -> Any:
    return assembled(
        diffusers.SkyReelsV2Pipeline,
        transformer=sharpened(
            lambda: diffusers.SkyReelsV2Transformer3DModel(
                num_attention_heads=4,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=TEXT,
                freq_dim=32,
                ffn_dim=32,
                num_layers=2,
                rope_max_seq_len=32,
            )
        ),
        scheduler=flow_unipc(),
    )


def hunyuan_video() -> Any:
    return assembled(
        diffusers.HunyuanVideoPipeline,
        transformer=sharpened(
            lambda: diffusers.HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=4,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=TEXT,
                pooled_projection_dim=8,
                rope_axes_dim=(4, 6, 6),
                guidance_embeds=True,
            )
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def hunyuan_video_call(pipeline: Any) -> dict[str, Any]:
    """With guidance that is embedded as well as guidance by a negative prompt."""
    return common(
        true_cfg_scale=4.0,
        guidance_scale=6.0,
        prompt_attention_mask=valid(7, 6),
        pooled_prompt_embeds=seeded(1, 8, seed=2),
        negative_prompt_attention_mask=valid(4, 3),
        negative_pooled_prompt_embeds=seeded(1, 8, seed=3),
        **SIZE,
        **prompts(),
    )


CASES = {
    name: PipelineCase(name, "branches", build, arguments, 2)
    for name, build, arguments in (
        ("Wan", wan, wan_call),
        ("Wan, a timestep for each token", wan_of_tokens_times, wan_call),
        ("SkyReels V2", sky_reels, wan_call),
        ("HunyuanVideo", hunyuan_video, hunyuan_video_call),
    )
} | {
    "Wan, two experts": PipelineCase(
        "Wan, two experts",
        "branches",
        wan_of_two_experts,
        wan_of_two_experts_call,
        2,
        ("transformer", "transformer_2"),
    )
}
