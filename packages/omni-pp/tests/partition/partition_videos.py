"""Small models of diffusers for videos, and a call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from partition_case import seeded, valid
from torch import nn


def hunyuan_video(image_condition_type: str | None = None) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=4,
        num_refiner_layers=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition_type,
    )


def hunyuan_video_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 3, 6, 10),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": seeded(2, 7, 16, seed=1),
        "encoder_attention_mask": valid(7, 2, 6).long(),
        "pooled_projections": seeded(2, 8, seed=2),
        "guidance": torch.full((2,), 6000.0),
    }


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=6,
        rope_max_seq_len=32,
    )


def wan_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 4, 3, 6, 10),
        "timestep": torch.full((1,), 400.0),
        "encoder_hidden_states": seeded(1, 6, 16, seed=1),
    }


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=6,
        caption_channels=24,
    )


def ltx_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 24, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.linspace(0, 900, 48).view(2, 24),
        "encoder_attention_mask": valid(7, 3, 7).long(),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "rope_interpolation_scale": (2.0, 32.0, 32.0),
    }


def ltx2() -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        num_layers=6,
        caption_channels=24,
    )


def ltx2_call() -> dict[str, Any]:
    mask = valid(7, 3, 7).long()
    return {
        "hidden_states": seeded(2, 24, 8),
        "audio_hidden_states": seeded(2, 5, 6, seed=1),
        "encoder_hidden_states": seeded(2, 7, 24, seed=2),
        "audio_encoder_hidden_states": seeded(2, 7, 24, seed=3),
        "timestep": torch.full((2,), 300.0),
        "sigma": torch.full((2,), 300.0),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 5,
    }


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=6,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )


def cogvideox_call() -> dict[str, Any]:
    angles = seeded(24, 8, scale=2).repeat_interleave(2, 1)
    return {
        "hidden_states": seeded(2, 2, 4, 6, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 500),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=6,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
    )


def mochi_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 2, 6, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 500),
        "encoder_attention_mask": valid(7, 3, 7),
    }


def allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        cross_attention_dim=96,
        sample_height=6,
        sample_width=8,
        sample_frames=2,
        caption_channels=24,
    )


def allegro_call() -> dict[str, Any]:
    angles = seeded(1, 24, 8, scale=2)
    position = torch.arange(24)
    grid = (position // 12, position // 4 % 3, position % 4)
    return {
        "hidden_states": seeded(2, 4, 2, 6, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 500),
        "attention_mask": torch.ones(2, 2, 6, 8),
        "encoder_attention_mask": valid(7, 3, 7),
        "image_rotary_emb": (
            tuple((angles.cos()[0, :, :], angles.sin()[0, :, :]) for _ in range(3)),
            tuple(one[None] for one in grid),
        ),
    }
