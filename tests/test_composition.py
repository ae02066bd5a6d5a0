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
from omni_pp import apply_pipeline_parallel
from omni_sp import SequenceParallelConfig, apply_sequence_parallel
from omni_vae_patch import parallelize_vae

sys.path.insert(0, str(Path(__file__).parent))
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


class Staged:
    """A pipeline in stages beside one that is left alone, and what its pictures are off."""

    def __init__(self, name: str, layout: ParallelLayout) -> None:
        self.case = CASES[name]
        self.state = ParallelState(layout)
        self.pipeline = self.case.build()
        self.options: dict[str, Any] = {}
        if layout.vae > 1:
            self.pipeline.vae = CASES["Stable Diffusion, two images decoded"].build().vae
            self.pipeline.vae.register_to_config(shift_factor=0.0)
            self.options = {"output_type": "pt"}
        self.alone = self.make()
        self.weights = self.held()

    def make(self) -> Any:
        return picture(self.pipeline(**self.case.arguments(self.pipeline) | self.options))

    def held(self) -> int:
        parts = [getattr(self.pipeline, name) for name in self.case.denoisers]
        return sum(p.numel() for part in parts for p in part.parameters())

    def off(self) -> float:
        return float((self.make() - self.alone).abs().max() / self.alone.abs().max())


def _second(pipeline: Any, state: ParallelState, what: str) -> Any:
    if what == "vae":
        return parallelize_vae(pipeline, state=state)
    return apply_cfg_parallel(pipeline, state=state)


@torch.no_grad()
def stages_and(what: str, name: str, layout: ParallelLayout, stages_last: bool) -> list[float]:
    """Errors with both, with what is left when one is removed, and with neither."""
    staged = Staged(name, layout)
    stages = apply_pipeline_parallel(staged.pipeline, state=staged.state)
    other = _second(staged.pipeline, staged.state, what)
    assert staged.held() < staged.weights
    errors = [staged.off(), staged.off()]
    for handle in (other, stages) if stages_last else (stages, other):
        handle.remove()
        errors.append(staged.off())
    assert staged.held() == staged.weights
    assert torch.equal(staged.make(), staged.alone)
    return errors


@pytest.mark.parametrize("stages_last", [False, True])
@pytest.mark.parametrize("name", ["Wan", "Stable Diffusion 3", "Flux"])
def test_stages_and_guidance(ranks, name, stages_last):
    layout = ParallelLayout(cfg=2, pp=2)
    for found in ranks.run(stages_and, "cfg", name, layout, stages_last, world_size=4):
        assert max(found) <= 1e-5


@pytest.mark.parametrize("stages_last", [False, True])
def test_stages_and_autoencoder(ranks, stages_last):
    name, layout = "Stable Diffusion 3", ParallelLayout(pp=2, vae=2)
    for found in ranks.run(stages_and, "vae", name, layout, stages_last, world_size=2):
        assert max(found) <= 1e-5
