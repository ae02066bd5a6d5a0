"""Small stock pipelines with blocks enough for several stages, and PipeFusion on them."""

from __future__ import annotations

from typing import Any

import torch
from deepened_pipelines import build
from stock_pipelines import CASES, picture
from torch import Tensor

from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp.pipefusion import PipeFusionConfig, PipeFusionHandle, apply_pipefusion
from omni_pp.pp_config import PipelineParallelConfig

STEPS = 4


def arguments(name: str, pipeline: Any, **more: Any) -> dict[str, Any]:
    """Of a call with steps enough to be stale."""
    return CASES[name].arguments(pipeline) | {"num_inference_steps": STEPS} | more


@torch.no_grad()
def alone(name: str) -> Tensor:
    """What one process makes."""
    pipeline = build(name)
    return picture(pipeline(**arguments(name, pipeline)))


def fused(
    pipeline: Any,
    stages: int,
    *,
    virtual: int = 1,
    shares: int = 1,
    force: bool = True,
    **options: Any,
) -> PipeFusionHandle:
    """Put PipeFusion on a pipeline."""
    return apply_pipefusion(
        pipeline,
        PipeFusionConfig(force=force, **options),
        stages=PipelineParallelConfig(virtual_stages=virtual),
        state=ParallelState(ParallelLayout(pp=stages, ring=shares)),
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    assert type(found) is Tensor
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())
