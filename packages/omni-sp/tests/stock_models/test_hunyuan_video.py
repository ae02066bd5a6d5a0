"""HunyuanVideoTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(image_condition_type: str | None = None) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=image_condition_type,
    )


def build_token_replace() -> nn.Module:
    """For image to video: the tokens of the first frame are modulated in another way."""
    return build("token_replace")


def call(frames: int, height: int, width: int, text: int, *lengths: int) -> dict[str, Any]:
    """With a prompt of so many tokens for each sample, padded to the length of the text."""
    batch = len(lengths)
    mask = torch.stack([torch.arange(text) < length for length in lengths])
    return {
        "hidden_states": seeded(batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": seeded(batch, text, 16),
        "encoder_attention_mask": mask.long(),
        "pooled_projections": seeded(batch, 8),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


CALLS = {
    "even": lambda: call(2, 8, 8, 8, 8),
    "odd": lambda: call(3, 6, 10, 7, 7, 7),
    "prompts of two lengths": lambda: call(3, 6, 10, 7, 2, 6),
    "short prompts of two lengths": lambda: call(3, 6, 10, 3, 3, 1),
    "less text than ranks": lambda: call(3, 6, 6, 1, 1),
}
CASES = {
    "text to video": ModelCase(build, CALLS),
    "token replace": ModelCase(build_token_replace, CALLS),
}


@pytest.mark.parametrize("kind", CASES)
@every_mode
def test_hunyuan_video(ranks: Any, mode: str, kind: str) -> None:
    compare(ranks, CASES[kind], mode)
