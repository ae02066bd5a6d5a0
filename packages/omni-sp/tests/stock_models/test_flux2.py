"""Flux2Transformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, randomised, seeded
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

diffusers = pytest.importorskip("diffusers")


def build() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )


def call(image: int, text: int, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": seeded(batch, image, 8),
        "encoder_hidden_states": seeded(batch, text, 24),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": seeded(1, image, 4, scale=4).expand(batch, -1, -1),
        "txt_ids": seeded(1, text, 4, scale=4).expand(batch, -1, -1),
        "return_dict": False,
    }


CASE = ModelCase(
    build,
    {
        "even": lambda: call(16, 8, 1),
        "odd": lambda: call(15, 7, 2),
        "less text than ranks": lambda: call(9, 1, 1),
    },
)


@every_mode
def test_flux2(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


def with_a_cache() -> str:
    model, arguments = randomised(build()), call(16, 8, 1)
    state = ParallelState(ParallelLayout(ulysses=2))
    with (
        apply_sequence_parallel(model, SequenceParallelConfig(2), state=state),
        pytest.raises(ParallelConfigError) as caught,
    ):
        model(**arguments, kv_cache_mode="extract", num_ref_tokens=4)
    return str(caught.value)


def test_a_cache_of_reference_images_is_refused_by_its_name(ranks: Any) -> None:
    for text in ranks.run(with_a_cache):
        assert "Flux2Transformer2DModel, parameter 'kv_cache_mode': its cache holds" in text
        assert "call the model without it" in text
