"""Small, unmodified pipelines of diffusers with random weights, each with a guided call."""

from __future__ import annotations

from . import (
    batch_images,
    batch_odd_inputs,
    batch_videos,
    branch_flux_like,
    branch_images,
    branch_odd_outputs,
    branch_videos,
    guiders,
    unets,
)
from .pipeline_case import PipelineCase, picture

CASES: dict[str, PipelineCase] = {
    name: case
    for module in (
        unets,
        batch_images,
        batch_odd_inputs,
        batch_videos,
        branch_flux_like,
        branch_images,
        branch_videos,
        branch_odd_outputs,
        guiders,
    )
    for name, case in module.CASES.items()
}

__all__ = ["CASES", "PipelineCase", "picture"]
