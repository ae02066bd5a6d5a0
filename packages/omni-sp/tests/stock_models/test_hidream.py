"""HiDreamImageTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_channels=[24, 20],
        text_emb_dim=12,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(6, 10),
        llama_layers=[0, 1, 1, 0],
        force_inference_output=True,
    )


def call(height: int, width: int, text: tuple[int, int], batch: int) -> dict[str, Any]:
    """Other shapes than squares are padded by the model, here to 15 tokens, with a mask."""
    t5, llama = text
    return {
        "hidden_states": seeded(batch, 4, 2 * height, 2 * width),
        "timesteps": torch.full((batch,), 500),
        "encoder_hidden_states_t5": seeded(batch, t5, 24),
        "encoder_hidden_states_llama3": seeded(2, batch, llama, 20),
        "pooled_embeds": seeded(batch, 12),
        "return_dict": False,
    }


def call_of_patches() -> dict[str, Any]:
    """As the editing pipeline calls it: patches, positions, sizes and mask by the caller."""
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))[:15]
    return call(3, 3, (3, 5), 2) | {
        "hidden_states": seeded(2, 15, 16),
        "img_ids": positions[None].repeat(2, 1, 1),
        "img_sizes": [(3, 4), (3, 4)],
        "hidden_states_masks": (torch.arange(15) < 12)[None].repeat(2, 1).float(),
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(4, 4, (4, 8), 1),
        "odd": lambda: call(3, 3, (3, 7), 2),
        "padded image": lambda: call(2, 5, (4, 5), 2),
        "patches": call_of_patches,
        "less image than ranks": lambda: call(1, 1, (3, 5), 1),
        "less text than ranks": lambda: call(3, 3, (1, 1), 1),
    },
)


@every_mode
def test_hidream(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
