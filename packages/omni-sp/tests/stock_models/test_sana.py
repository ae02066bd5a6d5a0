"""SanaTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(**options: Any) -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=8,
        **options,
    )


def build_sprint() -> nn.Module:
    """Sana Sprint: guidance is embedded, queries and keys are normalised."""
    return build(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def call(height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    valid = torch.arange(1, batch + 1) * text // batch
    return {
        "hidden_states": seeded(batch, 4, height, width),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": torch.arange(text) < valid[:, None],
        "return_dict": False,
    }


def controlled(height: int, width: int, batch: int, count: int) -> dict[str, Any]:
    """With what a ControlNet adds after some blocks, the first excepted."""
    samples = [seeded(batch, height * width, 64, seed=i) for i in range(count)]
    return call(height, width, 7, batch) | {"controlnet_block_samples": samples}


CASE = ModelCase(
    build,
    {
        "even": lambda: call(4, 4, 8, 1),
        "odd": lambda: call(7, 3, 7, 2),
        "a row for each rank": lambda: call(5, 5, 4, 1),
        "fewer rows than ranks": lambda: call(1, 6, 5, 1),
        "one column": lambda: call(9, 1, 5, 1),
        "less text than ranks": lambda: call(6, 5, 1, 1),
        "ControlNet": lambda: controlled(7, 3, 2, 1),
        "ControlNet, more samples than blocks": lambda: controlled(5, 4, 1, 3),
        "ControlNet, fewer rows than ranks": lambda: controlled(1, 6, 1, 1),
    },
)

SPRINT = ModelCase(
    build_sprint, {"odd": lambda: call(7, 3, 7, 2) | {"guidance": torch.full((2,), 4.5)}}
)


@every_mode
def test_sana(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


def test_sana_sprint(ranks: Any) -> None:
    compare(ranks, SPRINT, "ulysses 2 x ring 2")
