"""Small stock pipelines of diffusers with blocks enough for several stages."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stock_pipelines import CASES
from torch import nn

from omni_pp.partition import find_block_lists

_BLOCKS = 4
"""Blocks that each list of a model is given at least."""

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
