"""AuraFlowTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=20,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    )


def call(height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, 4, height, width),
        "encoder_hidden_states": seeded(batch, text, 20),
        "timestep": torch.full((batch,), 0.5),
        "return_dict": False,
    }


# The text has 8 register tokens before it.
CASE = ModelCase(
    build,
    {
        "even": lambda: call(8, 8, 8, 1),
        "odd": lambda: call(6, 10, 7, 2),
        "one token of text": lambda: call(6, 6, 1, 1),
    },
)


@every_mode
def test_auraflow(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
