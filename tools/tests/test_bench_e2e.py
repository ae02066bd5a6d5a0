"""The benchmark of whole pipelines makes one picture in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from bench import e2e_case
from bench.e2e_contestants import RANKS, whole_contestants
from bench.harness import Progress
from bench.models import build, inputs
from omni_parallel import ParallelConfig
from omni_parallel.demo.pipeline import load_pipeline

of_diffusers = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def small() -> tuple[Any, dict[str, Any]]:
    """A transformer of the benchmark before the demonstration model's autoencoder."""
    given = inputs("flux", 20)
    vae = load_pipeline(torch.device("cpu")).vae
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build("flux", 3),
    )
    channels = 4 * vae.config.latent_channels
    pipeline.transformer.proj_out = torch.nn.Linear(512, channels).requires_grad_(False)
    pipeline.transformer.x_embedder = torch.nn.Linear(channels, 512).requires_grad_(False)
    pipeline.transformer.register_to_config(in_channels=channels)
    arguments = {
        "height": 64,
        "width": 64,
        "latents": torch.randn(1, 16, channels, generator=torch.Generator().manual_seed(2)),
        "prompt_embeds": given["encoder_hidden_states"],
        "pooled_prompt_embeds": given["pooled_projections"],
    }
    return pipeline, arguments


CASE = e2e_case.WholeCase("small", "small", small)


def raced(folder: str) -> dict[str, tuple[float | None, int]]:
    torch.manual_seed(3)
    found = e2e_case.race_case(Progress(Path(folder) / "steps"), CASE, whole_contestants(), 2)
    assert len(found.single) == len(found.together) == 2
    return {one.name: (one.error, len(one.seconds)) for one in found.measured}


@of_diffusers
def test_every_contestant_makes_the_picture_of_one_process(ranks, tmp_path: Path):
    for found in ranks.run(raced, str(tmp_path), world_size=RANKS, init=False):
        assert list(found) == [one.name for one in whole_contestants()]
        for error, rounds in found.values():
            assert error is not None
            assert error <= 1e-5
            assert rounds == 2


@of_diffusers
@pytest.mark.parametrize("name", e2e_case.CASES)
def test_cases_have_an_autoencoder_and_as_many_tokens_as_pixels(name: str):
    pipeline, arguments = e2e_case.CASES[name].build()
    assert pipeline.vae is not None
    side = arguments["height"] // 16
    frames = (arguments.get("num_frames", 1) - 1) // 4 + 1
    latents = arguments["latents"]
    tokens = latents.shape[1] if latents.ndim == 3 else latents[0, 0].numel() // 4
    assert tokens == side * side * frames


def test_layouts_fit_the_ranks():
    for one in whole_contestants():
        if one.layout not in (None, "auto"):
            assert ParallelConfig.of(one.layout).ranks == RANKS
