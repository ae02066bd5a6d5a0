"""What each rank does when a layout is verified."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.generate import peak_memory, weight_bytes
from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.v1 import ParallelConfig, parallelize


@dataclass(frozen=True, kw_only=True)
class VerifyRequest:
    """What the pipeline is asked for, of one process and of the ranks alike."""

    model: str
    """Folder that a pipeline was saved to."""
    prompt: str = "a red fox in the snow"
    guided: bool = False
    """Whether to ask for two branches: guidance with a negative prompt."""
    steps: int = 4
    seed: int = 0
    width: int | None = None
    """Pixels; None: the pipeline's default."""
    height: int | None = None
    frames: int | None = None
    """Of a video."""
    dtype: str = "float32"
    device: str | None = None
    """Type of device; None: an accelerator for each rank."""


@dataclass(frozen=True)
class VerifiedRank:
    """What one rank measured."""

    rank: int
    seconds: float
    """Of the second call of the pipeline; the first one warms up."""
    peak_bytes: int
    weight_bytes: int


@record
def verify_rank(request: VerifyRequest, config: ParallelConfig, folder: str) -> VerifiedRank:
    """Make what is asked for, twice, and save what the second call gave: ``rank<r>.pt``."""
    end_with_launcher()
    torch.set_num_threads(1)
    pipeline = load(request)
    with torch.no_grad(), parallelize(pipeline, config, device=request.device) as ready:
        device, rank = ready.state.device, ready.state.rank
        if device.type != "cpu":
            pipeline.to(device)
        arguments = arguments_of(pipeline, request)
        weights = weight_bytes(pipeline.components.values())
        made = [_timed(ready, arguments, request.seed, device) for _ in range(2)]
        output, seconds = made[-1]
        torch.save(output.float().cpu(), Path(folder) / f"rank{rank}.pt")
        return VerifiedRank(rank, seconds, peak_memory(device), weights)


def load(request: VerifyRequest) -> Any:
    """The pipeline, on the CPU.

    Raises:
        ParallelConfigError: diffusers is not installed, or cannot load it.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        msg = "verify needs diffusers; try: pip install 'omni-parallel[diffusers]'"
        raise ParallelConfigError(msg) from error
    dtype = getattr(torch, request.dtype)
    pipeline = DiffusionPipeline.from_pretrained(request.model, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments_of(pipeline: Any, request: VerifyRequest) -> dict[str, Any]:
    """What the pipeline is called with: of the request, what it takes.

    Raises:
        ParallelConfigError: It takes no prompt, or not what the request names.
    """
    asked = {
        "prompt": request.prompt,
        "negative_prompt": "" if request.guided else None,
        "num_inference_steps": request.steps,
        "width": request.width,
        "height": request.height,
        "num_frames": request.frames,
        "output_type": "pt",
        "return_dict": False,
    }
    given: dict[str, Any] = {name: one for name, one in asked.items() if one is not None}
    legal = inspect.signature(type(pipeline).__call__).parameters
    unknown = [name for name in given if name not in legal]
    if unknown:
        msg = f"{type(pipeline).__name__} takes no {', '.join(unknown)}; leave it out"
        raise ParallelConfigError(msg)
    if request.guided and "true_cfg_scale" in legal:  # off unless it is asked for
        given["true_cfg_scale"] = 4.0
    tokenizer = getattr(pipeline, "tokenizer_2", None) or getattr(pipeline, "tokenizer", None)
    longest = getattr(tokenizer, "model_max_length", None)
    if "max_sequence_length" in legal and isinstance(longest, int):
        default = legal["max_sequence_length"].default
        if isinstance(default, int) and longest < default:
            given["max_sequence_length"] = longest
    return given


def _timed(
    call: Any, arguments: dict[str, Any], seed: int, device: torch.device
) -> tuple[Tensor, float]:
    start = time.perf_counter()
    found = call(**arguments, generator=torch.Generator().manual_seed(seed))[0]
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return torch.as_tensor(found), time.perf_counter() - start
