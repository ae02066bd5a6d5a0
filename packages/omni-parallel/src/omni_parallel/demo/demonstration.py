"""Drawing pictures on one process and on several ranks, and comparing them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.launch import RunResult, launch
from omni_parallel.demo.layout_option import check_config, choose_config
from omni_parallel.demo.pipeline import MODEL, load_pipeline
from omni_parallel.demo.request import PROMPTS, DemoRequest, check_prompts, check_size
from omni_parallel.demo.sheet import write_sheet
from omni_parallel.demo.table import comparison, layout_name, megabytes, verdict
from omni_parallel.launching.hosts import accelerators, device_for
from omni_parallel.reported_command import Outcome
from omni_parallel.v1 import ModelFacts, ParallelConfig, load_strategy


def demonstrate(given: dict[str, Any], console: Console) -> Outcome:
    """Draw, compare, and write the sheet that the options of the command ask for.

    Args:
        given: The options.
        console: For progress, tables and words.

    Raises:
        ClickException: It cannot work, and no rank has started; or the sheet cannot be written.
        RankFailedError: A rank failed; every one has ended.
    """
    width, height = given["size"]
    request = DemoRequest(
        prompts=given["prompts"] or PROMPTS,
        steps=given["steps"],
        seed=given["seed"],
        width=width,
        height=height,
    )
    _check_output(given["out"])
    try:
        config, ranks = choose_config(given["ranks"], given["layout"])
        _check(request, config, ranks)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    device = _device_for(ranks, console)
    single, parallel = _run_both(request, config, ranks, device, console)
    return _report(request, single, parallel, given["out"], console)


def _device_for(ranks: int, console: Console) -> str | None:
    """The CPU where there are too few accelerators, and say so; else ``None``."""
    devices = accelerators()
    if 0 < devices < ranks:
        console.print(f"{ranks} ranks need as many accelerators, here is {devices}: using the CPU")
    return device_for(ranks)


def _check_output(out: Path) -> None:
    # Not Path.is_dir, which raises where a folder above may not be searched.
    if not os.path.isdir(out.parent) or not os.access(out.parent, os.W_OK):
        msg = f"cannot write {out}: {out.parent.absolute()} is no folder that can be written to"
        raise click.BadParameter(msg, param_hint="--out")
    if out.suffix.lower() != ".png":
        msg = f"{out} is no PNG file; nearest: {out.with_suffix('.png')}"
        raise click.BadParameter(msg, param_hint="--out")


def _check(request: DemoRequest, config: ParallelConfig, ranks: int) -> None:
    """Find every mistake that can be found before a rank starts."""
    facts = ModelFacts.from_folder(MODEL)
    check_size(request, facts)
    check_config(config, ranks, request, facts)
    for name in config.strategies():
        load_strategy(name)
    check_prompts(request, load_pipeline(torch.device("cpu")))


def _run_both(
    request: DemoRequest, config: ParallelConfig, ranks: int, device: str | None, console: Console
) -> tuple[RunResult, RunResult | None]:
    results: list[RunResult] = []
    with Progress(console=console) as progress:
        for each, count in ((ParallelConfig(), 1), (config, ranks))[: 1 if ranks == 1 else 2]:
            title = "1 process" if count == 1 else f"{count} ranks  "
            task = progress.add_task(title, total=request.steps)

            def on_step(done: int, task: TaskID = task) -> None:
                progress.update(task, completed=done)

            results.append(launch(request, each, count, on_step, device))
            progress.update(task, completed=request.steps)
    return results[0], results[1] if len(results) > 1 else None


def _report(
    request: DemoRequest,
    single: RunResult,
    parallel: RunResult | None,
    out: Path,
    console: Console,
) -> Outcome:
    runs = [single] + ([parallel] if parallel else [])
    pictures = "picture" if len(request.prompts) == 1 else "pictures"
    console.print(
        f"{len(request.prompts)} {pictures} of {request.width} x {request.height} pixels, "
        f"{request.steps} steps, guidance {request.guidance:g}, float32"
    )
    console.print(comparison(single, runs[1:]))
    if parallel is not None and parallel.weight_bytes < single.weight_bytes:
        console.print(
            f"weights: {megabytes(single.weight_bytes)} on one process, "
            f"{megabytes(parallel.weight_bytes)} on each rank",
            highlight=False,
        )
    try:
        write_sheet(out, request.prompts, {_title(run): run.pictures[0] for run in runs})
    except OSError as error:
        msg = f"cannot write {out}: {error.strerror or error}"
        raise click.ClickException(msg) from None
    console.print(f"wrote {out.absolute()}", soft_wrap=True, highlight=False)
    keys: dict[str, Any] = {
        "layout": layout_name(runs[-1].config),
        "ranks": runs[-1].ranks,
        "file": str(out.absolute()),
        "runs": [_measured(run) for run in runs],
    }
    if parallel is None:
        return Outcome(keys)
    kept, said = verdict(parallel, single)
    console.print(said, soft_wrap=True)
    for name, found in (
        ("largest", parallel.difference(single)),
        ("psnr", parallel.worst_psnr(single)),
    ):
        keys[name] = found if math.isfinite(found) else None
    return Outcome(keys, kept)


def _measured(run: RunResult) -> dict[str, Any]:
    return {
        "ranks": run.ranks,
        "seconds_per_step": run.seconds_per_step,
        "bytes_per_step": run.bytes_per_step,
        "peak_bytes": run.peak_bytes,
        "weight_bytes": run.weight_bytes,
    }


def _title(run: RunResult) -> str:
    return "one process" if run.ranks == 1 else f"{run.ranks} ranks ({layout_name(run.config)})"
