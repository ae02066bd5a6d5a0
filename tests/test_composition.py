"""Strategies beside each other in one layout give what one process gives."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_cfgp import apply_cfg_parallel
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import SequenceParallelConfig, apply_sequence_parallel
from omni_vae_patch import parallelize_vae

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "omni-cfgp" / "tests"))
from stock_pipelines import CASES, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
def error(name: str, layout: ParallelLayout, guidance_first: bool) -> float:
    """Of the picture of a layout, relative to its largest value."""
    case = CASES[name]
    pipeline = case.build()
    alone = picture(pipeline(**case.arguments(pipeline)))
    state = ParallelState(layout)
    ways: list[Any] = []
    if layout.sp > 1:
        config = SequenceParallelConfig(layout.ulysses, layout.ring)
        ways.append(lambda: apply_sequence_parallel(pipeline.transformer, config, state=state))
    if layout.cfg > 1:
        ways.append(lambda: apply_cfg_parallel(pipeline, state=state))
    if layout.vae > 1:
        ways.append(lambda: parallelize_vae(pipeline, state=state))
    with ExitStack() as stack:
        for way in reversed(ways) if guidance_first else ways:
            stack.enter_context(way())
        found = picture(pipeline(**case.arguments(pipeline)))
    assert torch.equal(picture(pipeline(**case.arguments(pipeline))), alone)
    return float((found - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("guidance_first", [False, True])
@pytest.mark.parametrize("name", ["Flux", "Wan", "Stable Diffusion 3", "Qwen-Image"])
def test_guidance_and_sequence(ranks, name, guidance_first):
    layout = ParallelLayout(cfg=2, ulysses=2)
    for found in ranks.run(error, name, layout, guidance_first, world_size=4):
        assert found <= 1e-5


def test_guidance_and_ring(ranks):
    for found in ranks.run(error, "Chroma", ParallelLayout(cfg=2, ring=2), False, world_size=4):
        assert found <= 1e-5


@pytest.mark.parametrize("guidance_first", [False, True])
def test_guidance_and_autoencoder(ranks, guidance_first):
    name, layout = "Stable Diffusion, two images decoded", ParallelLayout(cfg=2, vae=2)
    for found in ranks.run(error, name, layout, guidance_first, world_size=2):
        assert found <= 1e-5
