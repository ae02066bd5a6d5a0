"""Flux2Transformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def call(image: int, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, image, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": seeded(1, image, 4, scale=4).expand(batch, -1, -1),
        "txt_ids": seeded(1, text, 4, scale=4).expand(batch, -1, -1),
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(16, 8, 1),
        "odd": lambda: call(15, 7, 2),
        "less text than ranks": lambda: call(9, 1, 1),
    },
)


@every_mode
def test_flux2(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
