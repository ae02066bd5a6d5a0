"""SD3Transformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(dual_attention_layers: tuple[int, ...] = ()) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=20,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm",
    )


def build_with_image_attention() -> nn.Module:
    """As 3.5 medium: some blocks attend over the image once more."""
    return build((0,))


def call(height: int, width: int, text: int, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, 4, height, width),
        "encoder_hidden_states": seeded(batch, text, 20),
        "pooled_projections": seeded(batch, 12),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    } | more


CALLS = {
    "even": lambda: call(8, 8, 8, 1),
    "odd": lambda: call(6, 10, 7, 2),
    "less text than ranks": lambda: call(6, 6, 1, 1),
    "ControlNet": lambda: call(
        6, 10, 7, 1, block_controlnet_hidden_states=[seeded(1, 15, 32), seeded(1, 15, 32, seed=1)]
    ),
    "layers skipped": lambda: call(6, 10, 7, 1, skip_layers=[0]),
}
CASES = {"3": ModelCase(build, CALLS), "3.5": ModelCase(build_with_image_attention, CALLS)}


@pytest.mark.parametrize("version", CASES)
@every_mode
def test_sd3(ranks: Any, mode: str, version: str) -> None:
    compare(ranks, CASES[version], mode)
