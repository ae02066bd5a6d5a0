"""Lumina2Transformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(64, 32, 32),
        cap_feat_dim=24,
    )


def call(height: int, width: int, text: int, valid: list[int]) -> dict[str, Any]:
    batch = len(valid)
    return {
        "hidden_states": seeded(batch, 4, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": seeded(batch, text, 24),
        "encoder_attention_mask": torch.arange(text) < torch.tensor(valid)[:, None],
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(4, 4, 8, [8]),
        "odd": lambda: call(3, 5, 8, [8]),
        "texts of one length": lambda: call(3, 3, 7, [5, 5]),
        "texts of two lengths": lambda: call(3, 3, 7, [4, 7]),
        "less image than ranks": lambda: call(1, 1, 8, [8, 3]),
        "less text than ranks": lambda: call(3, 3, 1, [1]),
    },
)


@every_mode
def test_lumina2(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
