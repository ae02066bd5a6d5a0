"""Small models of diffusers for images, and a call of each."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from partition_case import seeded, valid
from torch import nn


def flux(double: int = 3, single: int = 4) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )


def flux_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 15, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "pooled_projections": seeded(2, 20, seed=2),
        "timestep": torch.tensor([0.5, 0.25]),
        "img_ids": seeded(15, 3, scale=4),
        "txt_ids": torch.zeros(7, 3),
    }


def flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def flux2_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 15, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 4.0),
        "img_ids": seeded(1, 15, 4, scale=4).expand(2, -1, -1),
        "txt_ids": seeded(1, 7, 4, scale=4).expand(2, -1, -1),
    }


def qwen_image() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=6,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 15, 8),
        "encoder_hidden_states": seeded(1, 7, 24, seed=1),
        "encoder_hidden_states_mask": torch.arange(7)[None] < 5,
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, 3, 5)]],
    }


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def sd3_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 10),
        "encoder_hidden_states": seeded(2, 7, 20, seed=1),
        "pooled_projections": seeded(2, 12, seed=2),
        "timestep": torch.full((2,), 500.0),
    }


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=6,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )


def pixart_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 10),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": valid(7, 3, 7),
    }


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=64,
        n_layers=6,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )


def z_image_call() -> dict[str, Any]:
    return {
        "x": [seeded(16, 1, 10, 14), seeded(16, 1, 6, 10, seed=1)],
        "t": torch.tensor([0.3, 0.7]),
        "cap_feats": [seeded(33, 24, seed=2), seeded(5, 24, seed=3)],
    }


def sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=6,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=8,
    )


def sana_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 5),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 500),
        "encoder_attention_mask": valid(7, 3, 7),
    }


def auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=3,
        num_single_dit_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=20,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )


def auraflow_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 10),
        "encoder_hidden_states": seeded(2, 7, 20, seed=1),
        "timestep": torch.full((2,), 0.5),
    }


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=6,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32),
        cap_feat_dim=24,
    )


def lumina2_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 6, 10),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "encoder_attention_mask": valid(7, 3, 7),
    }


def hunyuan_image() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_single_layers=4,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=20,
        rope_axes_dim=(8, 8),
    )


def hunyuan_image_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 4, 5, 6),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "encoder_attention_mask": valid(7, 3, 7),
        "encoder_hidden_states_2": seeded(2, 5, 20, seed=2),
        "encoder_attention_mask_2": valid(5, 4, 2),
    }
