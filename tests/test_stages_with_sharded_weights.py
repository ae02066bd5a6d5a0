"""Weights of a stage that the ranks of this stage share."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "omni-pp" / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "omni-pp" / "tests" / "pipefusion"))
from deepened_pipelines import build
from pipefusion_cases import arguments, distance
from stale_reference import StaleReference
from stock_pipelines import CASES, picture

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_hsdp import HSDPInferenceConfig, apply_hsdp_to_model, hsdp_report, remove_hsdp
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import apply_pipeline_parallel, load_stage
from omni_pp.partition import partition_of
from omni_pp.pipefusion import PipeFusionConfig, apply_pipefusion
from omni_sp import SequenceParallelConfig, apply_sequence_parallel

pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LAYOUT = ParallelLayout(pp=2, ulysses=2, fs=2)
CONFIG = HSDPInferenceConfig(
    enabled=True, hsdp_shard_size=2, hsdp_replicate_size=1, param_dtype=torch.float32
)


def error(pipeline: Any, name: str, expected: torch.Tensor) -> float:
    found = picture(pipeline(**CASES[name].arguments(pipeline)))
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def share(name: str, sequence: bool) -> list[float]:
    """Stages, then shares of their weights, and perhaps tokens over the same ranks."""
    whole = build(name)
    expected = picture(whole(**CASES[name].arguments(whole)))
    pipeline, state = build(name), ParallelState(LAYOUT)
    model = pipeline.transformer
    stages = apply_pipeline_parallel(pipeline, state=state)
    part = stages.partitions["transformer"].parameter_bytes
    apply_hsdp_to_model(model, CONFIG, state=state)
    assert hsdp_report(model).total <= part
    with ExitStack() as stack:
        if sequence:
            tokens = SequenceParallelConfig(2, 1)
            stack.enter_context(apply_sequence_parallel(model, tokens, state=state))
        errors = [error(pipeline, name, expected) for _ in range(2)]
        with pytest.raises(ParallelError, match=r"call remove_hsdp\(\) first"):
            stages.remove()
        assert not stages.removed
        errors.append(error(pipeline, name, expected))
    remove_hsdp(model)
    stages.remove()
    for key, value in whole.transformer.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    return [*errors, error(pipeline, name, expected)]


@pytest.mark.parametrize(("name", "sequence"), [("Flux", True), ("Wan", False)])
def test_stages_share_their_weights(ranks: Any, name: str, sequence: bool) -> None:
    for errors in ranks.run(share, name, sequence, world_size=4, timeout=120):
        assert max(errors) <= 1e-5


@torch.no_grad()
def load_and_share(folder: Path) -> list[float]:
    whole = build("Wan")
    expected = picture(whole(**CASES["Wan"].arguments(whole)))
    state = ParallelState(LAYOUT)
    pipeline = build("Wan")
    cls: Any = type(whole.transformer)
    pipeline.transformer = load_stage(cls, folder, state=state)
    part = partition_of(pipeline.transformer)
    apply_hsdp_to_model(pipeline.transformer, CONFIG, state=state)
    errors = []
    for _ in range(2):
        with apply_pipeline_parallel(pipeline, state=state):
            errors.append(error(pipeline, "Wan", expected))
        assert partition_of(pipeline.transformer) is part
    return errors


def test_a_stage_that_was_loaded_shares_its_weights(ranks: Any, tmp_path: Path) -> None:
    model = build("Wan").transformer
    model.register_to_config(num_layers=len(model.blocks))
    model.save_pretrained(tmp_path)
    for errors in ranks.run(load_and_share, tmp_path, world_size=4, timeout=120):
        assert max(errors) <= 1e-5


def shared_first() -> str:
    pipeline, state = build("Flux"), ParallelState(LAYOUT)
    apply_hsdp_to_model(pipeline.transformer, CONFIG, state=state)
    try:
        apply_pipeline_parallel(pipeline, state=state)
    except ParallelConfigError as error:
        return str(error)
    return "none"


def test_weights_that_are_shared_first_are_refused(ranks: Any) -> None:
    for text in ranks.run(shared_first, world_size=4):
        assert "FluxTransformer2DModel cannot be cut into stages while ranks share" in text
        assert "such as the layout pp=2, ulysses=2, fs=2" in text


@torch.no_grad()
def patches_over_shared_weights(name: str) -> list[float]:
    """Stages, patches whose tokens ranks share, and shares of the weights over the same ranks."""
    reference = build(name)
    StaleReference(reference.transformer, 2, 1, CASES[name].calls_per_step)
    expected = picture(reference(**arguments(name, reference)))
    pipeline, state = build(name), ParallelState(LAYOUT)
    with apply_pipefusion(pipeline, PipeFusionConfig(force=True), state=state):
        apply_hsdp_to_model(pipeline.transformer, CONFIG, state=state)
        found = [picture(pipeline(**arguments(name, pipeline))) for _ in range(2)]
        remove_hsdp(pipeline.transformer)
    return [distance(one, expected) for one in found]


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_patches_go_through_shared_weights(ranks: Any, name: str) -> None:
    for errors in ranks.run(patches_over_shared_weights, name, world_size=4, timeout=120):
        assert max(errors) <= 1e-5


def shared_twice() -> list[str]:
    pipeline, state = build("Flux"), ParallelState(LAYOUT)
    tokens = SequenceParallelConfig(2, 1)
    said = []
    with apply_sequence_parallel(pipeline.transformer, tokens, state=state):
        with pytest.raises(ParallelConfigError) as caught:
            apply_pipefusion(pipeline, state=state)
        said.append(str(caught.value))
    with apply_pipefusion(pipeline, state=state):
        with pytest.raises(ParallelConfigError) as caught:
            apply_sequence_parallel(pipeline.transformer, tokens, state=state)
        said.append(str(caught.value))
    return said


def test_tokens_are_not_shared_twice(ranks: Any) -> None:
    for patches_second, patches_first in ranks.run(shared_twice, world_size=4):
        assert "transformer_blocks.0.attn was taken over before PipeFusion" in patches_second
        assert "PipeFusion shares tokens over the sp group itself" in patches_second
        assert "was taken over before, as PipeFusion does" in patches_first
