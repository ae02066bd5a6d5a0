"""Small stock pipelines with blocks enough for several stages, and PipeFusion on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stock_pipelines import CASES, picture
from torch import Tensor, nn

from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp.partition import find_block_lists
from omni_pp.pipefusion import PipeFusionConfig, PipeFusionHandle, apply_pipefusion
from omni_pp.pp_config import PipelineParallelConfig

_BLOCKS = 4
"""Blocks that each list of a model is given at least."""

STEPS = 4

LISTED = (
    "Flux",
    "Flux 2 Klein",
    "Qwen-Image",
    "Wan",
    "Stable Diffusion 3",
    "HunyuanVideo",
    "LTX-Video, rescaled",
    "CogVideoX",
    "PixArt Alpha",
    "Z-Image",
)
"""Of each class that is known, a pipeline with guidance."""


def deepen(model: nn.Module) -> None:
    """Give each list of a small model blocks enough for several stages, all different."""
    generator = torch.Generator().manual_seed(11)
    for found in find_block_lists(model):
        blocks: Any = model.get_submodule(found.name)
        while len(blocks) < _BLOCKS:
            twin = copy.deepcopy(blocks[0])
            for parameter in twin.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.02 * noise.to(parameter.dtype))
            blocks.insert(1 if len(blocks) > 1 else len(blocks), twin)


def build(name: str) -> Any:
    """A pipeline, the same on every rank."""
    pipeline = CASES[name].build()
    for part in CASES[name].denoisers:
        deepen(getattr(pipeline, part))
    return pipeline


def arguments(name: str, pipeline: Any, **more: Any) -> dict[str, Any]:
    """Of a call with steps enough to be stale."""
    return CASES[name].arguments(pipeline) | {"num_inference_steps": STEPS} | more


@torch.no_grad()
def alone(name: str) -> Tensor:
    """What one process makes."""
    pipeline = build(name)
    return picture(pipeline(**arguments(name, pipeline)))


def fused(
    pipeline: Any, world: int, *, virtual: int = 1, force: bool = True, **options: Any
) -> PipeFusionHandle:
    """Put PipeFusion on a pipeline."""
    return apply_pipefusion(
        pipeline,
        PipeFusionConfig(force=force, **options),
        stages=PipelineParallelConfig(virtual_stages=virtual),
        state=ParallelState(ParallelLayout(pp=world)),
    )


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest element."""
    assert type(found) is Tensor
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())
