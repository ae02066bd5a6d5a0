"""``omni-parallel plan`` takes the size that a pipeline makes where it is asked for none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")

import diffusers

from omni_parallel.plan.command import plan
from omni_parallel.plan.default_size import DefaultSize, default_size

NONE = {"height": None, "width": None}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
SD3 = {
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 16,
    "sample_size": 16,
}


@pytest.mark.parametrize(
    ("defaults", "config", "found"),
    [
        (NONE, {"sample_size": 64}, (512, 512, 1)),
        (NONE, {"sample_size": [60, 106]}, (848, 480, 1)),
        (NONE, {}, (1024, 1024, 1)),  # as that of Flux
        (
            {**NONE, "num_frames": None},
            {"sample_width": 90, "sample_height": 60, "sample_frames": 49},
            (720, 480, 49),
        ),
        ({"height": 480, "width": 832, "num_frames": 81}, {"sample_size": 9}, (832, 480, 81)),
        ({}, {}, (1024, 1024, 1)),
    ],
)
def test_what_the_call_is_not_told(
    defaults: dict[str, Any], config: dict[str, Any], found: tuple[int, int, int]
) -> None:
    assert default_size(defaults, config, 8) == DefaultSize(*found)


def test_the_size_of_a_pipeline_whose_denoiser_says_it(tmp_path: Path) -> None:
    for name, kind, config in (
        ("transformer", "SD3Transformer2DModel", SD3),
        ("vae", "AutoencoderKL", VAE),
    ):
        (tmp_path / name).mkdir()
        getattr(diffusers, kind)(**config).save_config(tmp_path / name)
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    options = [str(tmp_path), "--gpus", "2", "--gpu", "h200", "--json"]
    result = CliRunner().invoke(plan, options)
    assert result.exit_code == 0, result.output
    request = json.loads(result.stdout)["request"]
    assert (request["width"], request["height"]) == (32, 32)
