"""QwenImageTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(zero_cond_t: bool = False) -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )


def build_with_index() -> nn.Module:
    """As Edit 2511: tokens of the images to edit are modulated as if at time 0."""
    return build(zero_cond_t=True)


def call(
    images: list[tuple[int, int, int]], text: int, batch: int, *lengths: int, **more: Any
) -> dict[str, Any]:
    tokens = sum(frames * height * width for frames, height, width in images)
    mask = torch.stack([torch.arange(text) < length for length in lengths]) if lengths else None
    return {
        "hidden_states": seeded(batch, tokens, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [images] * batch,
        "return_dict": False,
    } | more


CALLS = {
    "even": lambda: call([(1, 4, 4)], 8, 1),
    "odd": lambda: call([(1, 3, 5)], 7, 2),
    "less text than ranks": lambda: call([(1, 3, 3)], 1, 1, 1),
    "texts of two lengths": lambda: call([(1, 3, 5)], 7, 2, 2, 7),
    "short texts of two lengths": lambda: call([(1, 3, 5)], 3, 2, 1, 3),
    "two images": lambda: call([(1, 3, 3), (1, 2, 3)], 7, 2, 5, 7),
    "ControlNet": lambda: call([(1, 3, 5)], 7, 1, controlnet_block_samples=[seeded(1, 15, 64)]),
}
CASES = {"plain": ModelCase(build, CALLS), "zero_cond_t": ModelCase(build_with_index, CALLS)}


@pytest.mark.parametrize("kind", CASES)
@every_mode
def test_qwen_image(ranks: Any, mode: str, kind: str) -> None:
    compare(ranks, CASES[kind], mode)
