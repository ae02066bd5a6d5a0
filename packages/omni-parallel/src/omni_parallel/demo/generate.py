"""What each rank of the demonstration does."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from omni_group_coordinator import record_traffic
from omni_parallel.demo.pipeline import load_pipeline
from omni_parallel.demo.request import DemoRequest
from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.launching.measures import peak_memory, weight_bytes
from omni_parallel.v1 import ParallelConfig, Parallelized, parallelize

if TYPE_CHECKING:
    from diffusers import FluxPipeline

PROGRESS = "progress.json"
"""File in a run's folder in which rank 0 says how many steps are done."""


@dataclass(frozen=True)
class RankReport:
    """What one rank measured."""

    rank: int
    seconds_per_step: float
    """Median over the steps after the first, both guidance branches included."""
    bytes_per_step: float
    """Bytes that this rank sent, by all operations."""
    peak_bytes: int
    """Peak memory: of the accelerator if there is one, else resident memory of the process."""
    weight_bytes: int = 0
    """Bytes of parameters that this rank holds between steps: shares where ranks share them."""


@record
def run_rank(
    request: DemoRequest, config: ParallelConfig, folder: str, device: str | None = None
) -> RankReport:
    """Generate the pictures and save this rank's; runs in a process of the launcher.

    Runs on the given type of device, or on the accelerator of its local rank if there is one.
    Saves ``rank<r>.pt`` in the folder: float32 of shape ``(pictures, 3, height, width)`` in
    [0, 1], before quantisation.
    """
    end_with_launcher()
    torch.set_num_threads(1)
    pipeline = load_pipeline(torch.device("cpu"))
    with parallelize(pipeline, config, device=device) as ready:
        rank, place = ready.state.rank, ready.state.device
        weights = weight_bytes(pipeline.components.values())
        clock = _Clock(Path(folder) / PROGRESS if rank == 0 else None)
        with record_traffic() as traffic:
            pictures = generate(ready, request, clock)
        torch.save(pictures.cpu(), Path(folder) / f"rank{rank}.pt")
        return RankReport(
            rank,
            clock.seconds_per_step(),
            traffic.total_bytes / request.steps,
            peak_memory(place),
            weights,
        )


def generate(
    pipeline: FluxPipeline | Parallelized, request: DemoRequest, after_step: Any = None
) -> Tensor:
    """The pictures of a run, one for each prompt.

    Args:
        pipeline: Any with the call of diffusers' ``FluxPipeline``, or one whose work is shared.
        request: The run.
        after_step: Called after each step, as ``callback_on_step_end`` of diffusers.

    Returns:
        float32 of shape ``(pictures, 3, height, width)`` in [0, 1].
    """
    generators = [
        torch.Generator().manual_seed(request.seed + i) for i in range(len(request.prompts))
    ]
    result = pipeline(
        prompt=list(request.prompts),
        negative_prompt=[request.negative_prompt] * len(request.prompts),
        true_cfg_scale=request.guidance,
        num_inference_steps=request.steps,
        width=request.width,
        height=request.height,
        generator=generators,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        output_type="pt",
        callback_on_step_end=after_step,
    )
    pictures: Tensor = result.images
    return pictures.float()


class _Clock:
    """Notes when each step ends, and tells the launcher's process."""

    def __init__(self, progress: Path | None) -> None:
        self._progress = progress
        self._ends: list[float] = []

    def __call__(
        self, pipeline: object, step: int, timestep: object, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        self._ends.append(time.perf_counter())
        if self._progress is not None:
            self._progress.write_text(json.dumps(len(self._ends)))
        return {}

    def seconds_per_step(self) -> float:
        pairs = zip(self._ends, self._ends[1:], strict=False)
        return statistics.median([end - start for start, end in pairs] or [float("nan")])
