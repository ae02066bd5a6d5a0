"""Small stock pipelines with blocks enough for several stages, and PipeFusion on them."""

from __future__ import annotations

from typing import Any

import torch
from deepened_pipelines import build
from stale_reference import StaleReference
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


@torch.no_grad()
def strays(
    name: str, stages: int, patches: int, *, virtual: int = 1, shares: int = 1
) -> tuple[float, float, float]:
    """Differences of two requests from the definition; and of the definition from the exact one."""
    case = CASES[name]
    reference = build(name)
    for part in case.denoisers:
        StaleReference(getattr(reference, part), patches, 1, case.calls_per_step)
    expected = picture(reference(**arguments(name, reference)))
    pipeline = build(name)
    found = []
    with fused(pipeline, stages, patches=patches, virtual=virtual, shares=shares):
        for _ in range(2):
            found.append(distance(picture(pipeline(**arguments(name, pipeline))), expected))
    return found[0], found[1], distance(expected, alone(name))
