"""LTX2VideoTransformer3DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")


def build(**options: Any) -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=4,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=24,
        **options,
    )


def build_newer() -> nn.Module:
    """With all that LTX-2.3 and LTX-2.5 added."""
    return build(
        rope_type="split",
        gated_attn=True,
        audio_gated_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        perturbed_attn=True,
        use_keyframes_abs_pos_embedding=True,
    )


def call(
    grid: tuple[int, int, int], audio: int, text: int, batch: int, **more: Any
) -> dict[str, Any]:
    frames, height, width = grid
    valid = torch.arange(1, batch + 1) * text // batch
    mask = (torch.arange(text) < valid[:, None]).long()
    return {
        "hidden_states": seeded(batch, frames * height * width, 8),
        "audio_hidden_states": seeded(batch, audio, 6, seed=1),
        "encoder_hidden_states": seeded(batch, text, 24, seed=2),
        "audio_encoder_hidden_states": seeded(batch, text, 24, seed=3),
        "timestep": torch.full((batch,), 300.0),
        "sigma": torch.full((batch,), 300.0),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
        "return_dict": False,
        **more,
    }


def per_token(batch: int, tokens: int) -> Tensor:
    return torch.linspace(0, 900, batch * tokens).view(batch, tokens)


CASE = ModelCase(
    build,
    {
        "even": lambda: call((2, 2, 4), 8, 8, 1),
        "odd": lambda: call((3, 3, 3), 13, 7, 2),
        "a timestep for each token": lambda: call(
            (3, 3, 3), 13, 7, 2, timestep=per_token(2, 27), audio_timestep=per_token(2, 13)
        ),
        "a timestep for each token of the video": lambda: call(
            (1, 3, 5), 6, 7, 2, timestep=per_token(2, 15), audio_timestep=torch.full((2,), 500.0)
        ),
        "less audio than ranks": lambda: call((1, 3, 3), 1, 1, 1),
        "isolated modalities": lambda: call((1, 3, 3), 7, 5, 1, isolate_modalities=True),
        "a mask of the video's attention": lambda: call(
            (1, 3, 3), 7, 5, 2, video_self_attention_mask=seeded(2, 9, 9).sigmoid()
        ),
    },
)

NEWER = ModelCase(
    build_newer,
    {
        "even": lambda: call((2, 2, 4), 8, 8, 1, use_cross_timestep=True),
        "odd": lambda: call((3, 3, 3), 13, 7, 2, use_cross_timestep=True),
        "one sample perturbed": lambda: call(
            (3, 3, 3),
            13,
            7,
            2,
            spatio_temporal_guidance_blocks=[1],
            perturbation_mask=torch.tensor([0.0, 1.0]),
        ),
        "all samples perturbed": lambda: call(
            (3, 3, 3), 13, 7, 2, spatio_temporal_guidance_blocks=[0]
        ),
        "keyframes": lambda: call(
            (3, 3, 3), 13, 7, 1, video_keyframes_mask=(torch.arange(27) < 9).view(1, 27, 1)
        ),
    },
)


@every_mode
def test_ltx2(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


@every_mode
def test_newer_ltx2(ranks: Any, mode: str) -> None:
    compare(ranks, NEWER, mode)
