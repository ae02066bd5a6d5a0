"""PipeFusion with guidance over ranks gives what its definition gives in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from omni_cfgp import apply_cfg_parallel
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp import PipeFusionConfig, apply_pipefusion

sys.path.insert(0, str(Path(__file__).parents[1] / "packages/omni-pp/tests/pipefusion"))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages/omni-pp/tests"))
sys.path.insert(0, str(Path(__file__).parent))
from deepened_pipelines import build
from pipefusion_cases import arguments, distance
from stale_reference import StaleReference
from stock_pipelines import picture

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@torch.no_grad()
def strays(name: str, patches: int) -> list[float]:
    """Differences of two requests from the definition."""
    reference = build(name)
    StaleReference(reference.transformer, patches, 1, 2)
    expected = picture(reference(**arguments(name, reference)))
    pipeline, state = build(name), ParallelState(ParallelLayout(pp=2, cfg=2))
    config = PipeFusionConfig(patches, force=True)
    with (
        apply_pipefusion(pipeline, config, state=state),
        apply_cfg_parallel(pipeline, state=state),
    ):
        found = [picture(pipeline(**arguments(name, pipeline))) for _ in range(2)]
    return [distance(one, expected) for one in found]


@pytest.mark.parametrize("patches", [2, 3])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_a_branch_on_each_pair_of_stages(ranks, name, patches):
    for found in ranks.run(strays, name, patches, world_size=4, timeout=180):
        assert max(found) <= 1e-5
