"""WanVACETransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    )


def call(frames: int, height: int, width: int, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": seeded(batch, 6, 16),
        "control_hidden_states": seeded(batch, 6, frames, height, width, seed=1),
        "return_dict": False,
    } | more


CASE = ModelCase(
    build,
    {
        "even": lambda: call(2, 8, 8, 1),
        "odd": lambda: call(3, 6, 10, 2),
        "control of fewer frames": lambda: call(
            3,
            6,
            10,
            1,
            control_hidden_states=seeded(1, 6, 2, 6, 10),
            control_hidden_states_scale=torch.tensor([1.0, 0.5]),
        ),
    },
)


@every_mode
def test_wan_vace(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
