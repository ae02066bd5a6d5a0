"""HeliosTransformer3DModel, by the plan that diffusers declares for it, on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    """Of two blocks, where the plan of the class numbers forty."""
    return diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_dim=(4, 6, 6),
    )


def call(frames: int, height: int, width: int, text: int, history: int = 0) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "hidden_states": seeded(1, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": seeded(1, text, 24),
        "indices_hidden_states": torch.arange(history, history + frames).unsqueeze(0),
        "return_dict": False,
    }
    if history:
        arguments["latents_history_short"] = seeded(1, 4, history, 2 * height, 2 * width, seed=1)
        arguments["indices_latents_history_short"] = torch.arange(history).unsqueeze(0)
    return arguments


CASE = ModelCase(
    build,
    {
        "even": lambda: call(2, 2, 4, 8),
        "odd": lambda: call(3, 3, 3, 7),
        "with history": lambda: call(3, 3, 3, 7, history=2),
    },
)


@pytest.mark.parametrize("mode", ["ulysses 2", "ring 2"])
def test_helios(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
