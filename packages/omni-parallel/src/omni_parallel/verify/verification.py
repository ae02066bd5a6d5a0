"""Running a few steps on one process and on a layout, and comparing what they make."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_parallel.comparable import is_exact, not_refused
from omni_parallel.known_pipeline import KnownPipeline
from omni_parallel.launching.failures import rank_failure
from omni_parallel.launching.hosts import device_for
from omni_parallel.launching.processes import run_processes
from omni_parallel.pipeline_request import OPTIONS, PipelineRequest, parse_size
from omni_parallel.v1 import ParallelConfig, auto_config, validate
from omni_parallel.verify.rank import VerifiedRank, verify_rank
from omni_parallel.verify.report import Verified


def verified(given: dict[str, Any], console: Console) -> Verified:
    """Compare what the options of the command ask for.

    Args:
        given: The options.
        console: For the progress.

    Raises:
        ParallelConfigError: It cannot work; no rank has started.
        RankFailedError: A rank failed; every one has ended.
    """
    request, config, ranks, note = _asked(given)
    if note is not None:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return _compared(request, config, ranks, console)


def _asked(given: dict[str, Any]) -> tuple[PipelineRequest, ParallelConfig, int, str | None]:
    """Everything that can be known before a weight is loaded.

    Raises:
        ParallelConfigError: It cannot work.
    """
    known = KnownPipeline.find(given["model"])
    facts = known.facts
    automatic = given["layout"] == "auto"
    config = (
        auto_config(given["nproc"] or 2, facts) if automatic else ParallelConfig.of(given["layout"])
    )
    config = not_refused(config)
    ranks = given["nproc"] or max(2, config.ranks)
    width, height = parse_size(given["size"])
    frames = given["frames"]
    size = None if width is None or height is None else (width, height, frames or 1)
    validate(config, ranks, facts, size)
    request = PipelineRequest(
        model=given["model"],
        negative_prompt="" if config.cfg > 1 else None,
        guidance=4.0 if config.cfg > 1 else None,  # of some pipelines it is off by default
        steps=given["steps"],
        width=width,
        height=height,
        frames=frames,
        dtype=given["dtype"],
    )
    guided = dict.fromkeys(
        ("negative_prompt", "guidance_scale", "true_cfg_scale"), f"--layout {config}"
    )
    known.check(request, {**OPTIONS, **guided})
    return request, config, ranks, known.size_note(width, height)


def _compared(
    request: PipelineRequest, config: ParallelConfig, ranks: int, console: Console
) -> Verified:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("1 process", total=None)
        single = _run(request, ParallelConfig(), 1)[0]
        progress.update(task, description=f"{ranks} ranks: {config}")
        several = _run(request, config, ranks)
    return Verified.of(request, (str(config), is_exact(config)), single, several)


def _run(
    request: PipelineRequest, config: ParallelConfig, ranks: int
) -> list[tuple[VerifiedRank, Tensor]]:
    with tempfile.TemporaryDirectory(prefix="omni-parallel-") as folder:
        args = (request, config, folder, device_for(ranks))
        try:
            found = run_processes(verify_rank, args, ranks, folder)
        except ChildFailedError as error:
            raise rank_failure(error) from None
        return [
            (VerifiedRank(**asdict(found[rank])), torch.load(Path(folder) / f"rank{rank}.pt"))
            for rank in range(ranks)
        ]
