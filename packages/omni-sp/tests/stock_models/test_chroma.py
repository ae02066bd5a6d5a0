"""ChromaTransformer2DModel on several ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name that diffusers itself imports
        return diffusers.ChromaTransformer2DModel(
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )


def call(image: int, text: int, batch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, image, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": seeded(image, 3, scale=4),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    } | more


def mask(image: int, *texts: int) -> torch.Tensor:
    """For each sample so many tokens of the longest text, then all of the image."""
    whole = max(texts)
    ones = [torch.arange(whole) < text for text in texts]
    return torch.cat([torch.stack(ones), torch.ones(len(texts), image, dtype=torch.bool)], 1)


CASE = ModelCase(
    build,
    {
        "even": lambda: call(16, 8, 1),
        "odd": lambda: call(15, 7, 2),
        "less text than ranks": lambda: call(9, 1, 1),
        "texts of two lengths": lambda: call(15, 7, 2, attention_mask=mask(15, 3, 7)),
        "short texts of two lengths": lambda: call(15, 3, 2, attention_mask=mask(15, 3, 1)),
        "mask as bias": lambda: call(15, 7, 2, attention_mask=mask(15, 3, 7).float()),
        "ControlNet": lambda: call(
            15,
            7,
            1,
            controlnet_block_samples=[seeded(1, 15, 64)],
            controlnet_single_block_samples=[seeded(1, 15, 64), seeded(1, 15, 64, seed=1)],
        ),
    },
)


@every_mode
def test_chroma(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)
