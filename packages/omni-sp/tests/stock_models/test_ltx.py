"""LTXVideoTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=24,
    )


def call(
    grid: tuple[int, int, int], text: int, batch: int, per_token: bool = False
) -> dict[str, Any]:
    frames, height, width = grid
    video = frames * height * width
    valid = torch.arange(1, batch + 1) * text // batch
    timestep = torch.full((batch,), 300.0)
    if per_token:
        timestep = torch.linspace(0, 900, batch * video).view(batch, video)
    return {
        "hidden_states": seeded(batch, video, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": timestep,
        "encoder_attention_mask": (torch.arange(text) < valid[:, None]).long(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (2.0, 32.0, 32.0),
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call((2, 2, 4), 8, 1),
        "odd": lambda: call((3, 3, 3), 7, 2),
        "a timestep for each token": lambda: call((3, 3, 3), 6, 2, per_token=True),
        "one timestep with two dimensions": lambda: (
            call((1, 3, 5), 6, 2) | {"timestep": torch.full((2, 1), 300.0)}
        ),
        "less video than ranks": lambda: call((1, 1, 1), 5, 2, per_token=True),
        "less text than ranks": lambda: call((1, 3, 3), 1, 1),
    },
)


@every_mode
def test_ltx(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
