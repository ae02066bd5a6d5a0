"""What each rank of the demonstration does."""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from omni_group_coordinator import record_traffic
from omni_parallel.demo.layouts import options_of, strategies_of
from omni_parallel.demo.pipeline import load_pipeline
from omni_parallel.demo.request import DemoRequest
from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.launching.measures import peak_memory, weight_bytes
from omni_parallel.v1 import load_strategy
from omni_parallel_state import (
    ParallelLayout,
    ParallelState,
    destroy_distributed_environment,
    init_distributed_environment,
)

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
    request: DemoRequest, layout: ParallelLayout, folder: str, device: str | None = None
) -> RankReport:
    """Generate the pictures and save this rank's; runs in a process of the launcher.

    Runs on the given type of device, or on the accelerator of its local rank if there is one.
    Saves ``rank<r>.pt`` in the folder: float32 of shape ``(pictures, 3, height, width)`` in
    [0, 1], before quantisation.
    """
    end_with_launcher()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if layout.world_size > 1:
            init_distributed_environment(device=device)
            stack.callback(destroy_distributed_environment)
        state = ParallelState(layout, device)
        stack.callback(state.destroy)
        pipeline = load_pipeline(state.device)
        for name in strategies_of(layout):
            options = options_of(layout, name)
            stack.enter_context(load_strategy(name).apply(pipeline, state, **options))
        weights = weight_bytes(pipeline.components.values())
        clock = _Clock(Path(folder) / PROGRESS if state.rank == 0 else None)
        with record_traffic() as traffic:
            pictures = generate(pipeline, request, clock)
        torch.save(pictures.cpu(), Path(folder) / f"rank{state.rank}.pt")
        return RankReport(
            state.rank,
            clock.seconds_per_step(),
            traffic.total_bytes / request.steps,
            peak_memory(state.device),
            weights,
        )


def generate(pipeline: FluxPipeline, request: DemoRequest, after_step: Any = None) -> Tensor:
    """The pictures of a run, one for each prompt.

    Args:
        pipeline: Any pipeline with the call of diffusers' ``FluxPipeline``.
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
