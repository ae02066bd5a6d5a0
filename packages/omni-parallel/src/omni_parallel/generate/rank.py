"""What each rank does to generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from omni_group_coordinator import ParallelConfigError
from omni_parallel.generate.output import save
from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.pipeline_request import PipelineRequest
from omni_parallel.v1 import parallelize


@record
def generate_rank(
    request: PipelineRequest, layout: str, out: Path | None, device: str | None = None
) -> list[Any]:
    """Generate; the first rank has the progress bar, and saves.

    Args:
        request: What is asked for, as PIL images.
        layout: What the ranks share, or ``"auto"``.
        out: File, or the first of several; None: nothing is written.
        device: Type of device; None: the accelerator of the local rank.

    Returns:
        The files that this rank wrote; where it was to write none, the pictures.
    """
    end_with_launcher()
    pipeline = request.load()
    if int(os.environ.get("RANK", "0")) > 0:
        pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), parallelize(pipeline, layout, device=device) as ready:
        found = ready(**request.arguments(pipeline), generator=request.generator())
        if ready.state.rank > 0:
            return []
        pictures = _pictures(found)
        return pictures if out is None else [str(path) for path in save(pictures, out)]


def _pictures(found: Any) -> list[Any]:
    """Images, or for each video the list of its frames.

    Raises:
        ParallelConfigError: The pipeline makes neither.
    """
    first = found[0]
    if isinstance(first, list) and first:
        return first
    msg = f"the pipeline made a {type(first).__name__}; legal: images or videos"
    raise ParallelConfigError(msg)
