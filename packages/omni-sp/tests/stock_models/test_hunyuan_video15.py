"""HunyuanVideo15Transformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=6,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=10,
        rope_axes_dim=(4, 6, 6),
    )


def call(
    frames: int, size: tuple[int, int], texts: tuple[int, int, int], *lengths: int, image: bool
) -> dict[str, Any]:
    """With so many tokens of both texts for each sample, and of an image that may be absent."""
    batch = len(lengths)
    image_embeds = seeded(batch, texts[2], 10)
    masks = [torch.stack([torch.arange(text) < n for n in lengths]).long() for text in texts[:2]]
    return {
        "hidden_states": seeded(batch, 6, frames, *size),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": seeded(batch, texts[0], 16),
        "encoder_attention_mask": masks[0],
        "encoder_hidden_states_2": seeded(batch, texts[1], 12),
        "encoder_attention_mask_2": masks[1],
        "image_embeds": image_embeds if image else torch.zeros_like(image_embeds),
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(2, (4, 4), (6, 4, 2), 6, image=True),
        "odd": lambda: call(3, (3, 5), (5, 3, 3), 5, 5, image=True),
        "prompts of two lengths": lambda: call(3, (3, 5), (5, 3, 3), 1, 4, image=True),
        "no image": lambda: call(3, (3, 5), (5, 3, 3), 4, 2, image=False),
        "less text than ranks": lambda: call(3, (3, 3), (1, 1, 1), 1, image=False),
    },
)


@every_mode
def test_hunyuan_video15(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
