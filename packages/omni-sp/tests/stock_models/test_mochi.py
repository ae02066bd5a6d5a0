"""MochiTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
    )


def call(grid: tuple[int, int, int], text: int, valid: list[int]) -> dict[str, Any]:
    frames, height, width = grid
    batch = len(valid)
    return {
        "hidden_states": seeded(batch, 4, frames, 2 * height, 2 * width),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.arange(text) < torch.tensor(valid)[:, None],
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call((2, 2, 4), 8, [8]),
        "odd": lambda: call((3, 3, 3), 7, [7, 4]),
        "less text than ranks": lambda: call((1, 3, 3), 7, [1]),
        "no text": lambda: call((1, 3, 5), 7, [0, 5]),
        "less video than ranks": lambda: call((1, 1, 1), 7, [7, 3]),
    },
)


# The model asks for autocast to float32, which CPUs do not have.
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@every_mode
def test_mochi(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
