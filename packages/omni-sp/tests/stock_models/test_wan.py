"""WanTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(**more: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        **{
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        }
        | more
    )


def build_image_to_video() -> nn.Module:
    """As Wan 2.1 I2V, with attention to an image."""
    return build(image_dim=20, added_kv_proj_dim=48)


def call(
    frames: int, height: int, width: int, batch: int, text: int = 6, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, 4, frames, height, width),
        "timestep": torch.linspace(400.0, 500.0, batch),
        "encoder_hidden_states": seeded(batch, text, 16),
        "return_dict": False,
    } | more


TEXT_TO_VIDEO = ModelCase(
    build,
    {
        "even": lambda: call(2, 8, 8, 1),
        "odd": lambda: call(3, 6, 10, 2),
        "less text than ranks": lambda: call(3, 6, 6, 1, text=1),
        "time of each token": lambda: call(
            3, 6, 10, 2, timestep=seeded(2, 45, scale=100).abs().round()
        ),
        "one time for all tokens": lambda: call(3, 6, 10, 2, timestep=torch.full((2, 1), 400.0)),
        "fewer tokens than ranks": lambda: call(1, 2, 2, 1),
    },
)
# The model takes the last 512 tokens for the text.
IMAGE_TO_VIDEO = ModelCase(
    build_image_to_video,
    {
        "even": lambda: call(2, 8, 8, 1, text=512, encoder_hidden_states_image=seeded(1, 6, 20)),
        "odd": lambda: call(3, 6, 10, 2, text=512, encoder_hidden_states_image=seeded(2, 5, 20)),
    },
)


@every_mode
def test_wan(ranks: Any, mode: str) -> None:
    compare(ranks, TEXT_TO_VIDEO, mode)


@every_mode
def test_wan_image_to_video(ranks: Any, mode: str) -> None:
    compare(ranks, IMAGE_TO_VIDEO, mode)
