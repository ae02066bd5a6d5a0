"""Models of diffusers that are in no table: their forwards are read, and they are cut by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from partition_case import randomised, seeded, valid
from partition_flow import all_stages, assert_equal, run_chunks
from torch import nn

from omni_pp.partition import find_block_lists


def hunyuan_video_15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=6,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=4,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
    )


def hunyuan_video_15_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 6, 2, 5, 6),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": seeded(2, 7, 16, seed=1),
        "encoder_attention_mask": valid(7, 3, 7).long(),
        "encoder_hidden_states_2": seeded(2, 5, 12, seed=2),
        "encoder_attention_mask_2": valid(5, 5, 2).long(),
        "image_embeds": seeded(2, 3, 10, seed=3),
    }


def helios() -> nn.Module:
    return diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=4,
        rope_dim=(4, 6, 6),
    )


def helios_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 4, 2, 6, 8),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": seeded(1, 7, 24, seed=1),
        "indices_hidden_states": torch.arange(3, 5).unsqueeze(0),
        "latents_history_short": seeded(1, 4, 3, 6, 8, seed=2),
        "indices_latents_history_short": torch.arange(3).unsqueeze(0),
    }


def ovis() -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def ovis_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(2, 15, 8),
        "encoder_hidden_states": seeded(2, 7, 24, seed=1),
        "timestep": torch.full((2,), 0.5),
        "img_ids": seeded(15, 3, scale=4),
        "txt_ids": torch.zeros(7, 3),
    }


def kandinsky() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
    )


def kandinsky_call() -> dict[str, Any]:
    return {
        "hidden_states": seeded(1, 2, 6, 8, 4),
        "encoder_hidden_states": seeded(1, 7, 24, seed=1),
        "timestep": torch.full((1,), 500.0),
        "pooled_projections": seeded(1, 12, seed=2),
        "visual_rope_pos": [torch.arange(2), torch.arange(3), torch.arange(4)],
        "text_rope_pos": torch.arange(7),
    }


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], list[str]]] = {
    "Helios": (helios, helios_call, ["blocks"]),
    "HunyuanVideo 1.5": (hunyuan_video_15, hunyuan_video_15_call, ["transformer_blocks"]),
    "Kandinsky 5": (kandinsky, kandinsky_call, ["visual_transformer_blocks"]),
    "Ovis": (ovis, ovis_call, ["transformer_blocks", "single_transformer_blocks"]),
}


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", MODELS)
def test_models_in_no_table(name: str) -> None:
    build, call, lists = MODELS[name]
    model = randomised(build)
    found = find_block_lists(model)
    assert [one.name for one in found] == lists
    count = sum(one.length for one in found)
    with torch.no_grad():
        expected = model(**call())
    for point in range(1, count):
        assert_equal(run_chunks(all_stages(model, 2, points=[point]), **call()), expected)
    assert_equal(run_chunks(all_stages(model, 2, virtual_stages=2), **call()), expected)
