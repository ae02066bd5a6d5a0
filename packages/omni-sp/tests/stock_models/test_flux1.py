"""FluxTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )


def call(image: int, text: int, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, image, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "pooled_projections": seeded(batch, 20),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": seeded(image, 3, scale=4),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    } | more


CASE = ModelCase(
    build,
    {
        "even": lambda: call(16, 8, 1),
        "odd": lambda: call(15, 7, 2),
        "less text than ranks": lambda: call(9, 1, 1),
        "ControlNet": lambda: call(
            15,
            7,
            1,
            controlnet_block_samples=[seeded(1, 15, 64)],
            controlnet_single_block_samples=[seeded(1, 15, 64, seed=1)],
        ),
    },
)


@every_mode
def test_flux(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
