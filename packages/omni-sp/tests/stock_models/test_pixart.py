"""PixArtTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, randomised, seeded
from torch import nn

from omni_group_coordinator import ParallelError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )


def call(height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    valid = torch.arange(1, batch + 1) * text // batch
    return {
        "hidden_states": seeded(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.arange(text) < valid[:, None],
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(4, 4, 8, 1),
        "odd": lambda: call(3, 5, 7, 2),
        "less image than ranks": lambda: call(1, 1, 5, 2),
        "less text than ranks": lambda: call(3, 3, 1, 1),
        "a mask of image tokens": lambda: (
            call(3, 3, 5, 1) | {"attention_mask": torch.arange(9)[None] % 3 != 0}
        ),
    },
)


@every_mode
def test_pixart(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


def without_text() -> str:
    model = randomised(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=1,
            in_channels=4,
            cross_attention_dim=64,
            caption_channels=None,
            use_additional_conditions=False,
        )
    )
    state = ParallelState(ParallelLayout(ulysses=2))
    arguments = call(4, 4, 6, 1) | {"encoder_hidden_states": None, "encoder_attention_mask": None}
    with (
        torch.no_grad(),
        apply_sequence_parallel(model, SequenceParallelConfig(2), state=state),
        pytest.raises(ParallelError) as caught,
    ):
        model(**arguments)
    return str(caught.value)


def test_a_missing_text_is_an_error_and_not_local_self_attention(ranks: Any) -> None:
    for text in ranks.run(without_text):
        assert "attn2' is local by the plan, and was called without encoder_hidden_states" in text
