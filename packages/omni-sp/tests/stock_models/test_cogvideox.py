"""CogVideoXTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(**options: Any) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
        **options,
    )


def build_rotary() -> nn.Module:
    return build(use_rotary_positional_embeddings=True)


def build_fused() -> nn.Module:
    model = build_rotary()
    model.fuse_qkv_projections()
    return model


def build_1_5() -> nn.Module:
    """CogVideoX 1.5: patches in time too, and the image-to-video model's offset embedding."""
    return build(use_rotary_positional_embeddings=True, patch_size_t=2, ofs_embed_dim=8)


def call(grid: tuple[int, int, int], text: int, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": seeded(batch, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def rotary(tokens: int) -> dict[str, Any]:
    angles = seeded(tokens, 8, scale=2).repeat_interleave(2, 1)
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


CASE = ModelCase(
    build,
    {
        "even": lambda: call((2, 2, 4), 7, 1),
        "odd": lambda: call((3, 3, 3), 7, 2),
    },
)

ROTARY = ModelCase(
    build_rotary,
    {
        "even": lambda: call((2, 2, 4), 8, 1) | rotary(16),
        "odd": lambda: call((3, 3, 3), 7, 2) | rotary(27),
        "less text than ranks": lambda: call((1, 3, 3), 1, 1) | rotary(9),
        "no rotary embedding": lambda: call((1, 3, 3), 5, 1),
    },
)

FUSED = ModelCase(build_fused, {"odd": lambda: call((3, 3, 3), 7, 2) | rotary(27)})

PATCHED_IN_TIME = ModelCase(
    build_1_5,
    {"odd": lambda: call((6, 3, 3), 7, 2) | rotary(27) | {"ofs": torch.full((1,), 2.0)}},
)


@every_mode
def test_cogvideox(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


@every_mode
def test_cogvideox_rotary(ranks: Any, mode: str) -> None:
    compare(ranks, ROTARY, mode)


def test_cogvideox_fused(ranks: Any) -> None:
    compare(ranks, FUSED, "ulysses 2 x ring 2")


def test_cogvideox_1_5(ranks: Any) -> None:
    compare(ranks, PATCHED_IN_TIME, "ulysses 2 x ring 2")
