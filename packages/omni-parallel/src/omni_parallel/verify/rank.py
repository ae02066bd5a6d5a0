"""What each rank does when a layout is verified."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.launching.measures import peak_memory, weight_bytes
from omni_parallel.pipeline_request import PipelineRequest
from omni_parallel.v1 import ParallelConfig, parallelize


@dataclass(frozen=True)
class VerifiedRank:
    """What one rank measured."""

    rank: int
    seconds: float
    """Of the second call of the pipeline; the first one warms up."""
    peak_bytes: int
    weight_bytes: int


@record
def verify_rank(
    request: PipelineRequest, config: ParallelConfig, folder: str, device: str | None = None
) -> VerifiedRank:
    """Make what is asked for, twice, and save what the second call gave: ``rank<r>.pt``.

    Args:
        request: Of tensors.
        config: What the ranks share.
        folder: For the result.
        device: Type of device; None: an accelerator for each rank.
    """
    end_with_launcher()
    torch.set_num_threads(1)
    pipeline = request.load()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), parallelize(pipeline, config, device=device) as ready:
        place, rank = ready.state.device, ready.state.rank
        weights = weight_bytes(pipeline.components.values())
        made = [_timed(ready, request, place) for _ in range(2)]
        output, seconds = made[-1]
        torch.save(output.float().cpu(), Path(folder) / f"rank{rank}.pt")
        return VerifiedRank(rank, seconds, peak_memory(place), weights)


def _timed(ready: Any, request: PipelineRequest, device: torch.device) -> tuple[Tensor, float]:
    arguments = request.arguments(ready.target)
    start = time.perf_counter()
    found = ready(**arguments, generator=request.generator())[0]
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return torch.as_tensor(found), time.perf_counter() - start
