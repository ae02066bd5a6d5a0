"""``omni-parallel verify``."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel.comparable import is_exact, not_refused
from omni_parallel.launching.failures import first_failure
from omni_parallel.launching.hosts import device_for
from omni_parallel.launching.processes import run_processes
from omni_parallel.pipeline_request import PipelineRequest, parse_size
from omni_parallel.v1 import ModelFacts, ParallelConfig, auto_config, validate, versions
from omni_parallel.verify.rank import VerifiedRank, verify_rank
from omni_parallel.verify.report import TOLERANCE, Verified


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option("--layout", default="auto", show_default=True, help="What the ranks share.")
@click.option("--nproc", type=click.IntRange(2, 64), help="Ranks, for --layout auto.  [default: 2]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True)
@click.option("--dtype", type=click.Choice(list(TOLERANCE)), default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def verify(**given: Any) -> None:
    """Run a few steps of MODEL on one process and on a layout, and compare.

    MODEL is a folder that a pipeline of diffusers was saved to. Exits with 1 when the results
    differ by more than the tolerance of the dtype, or a rank failed.
    """
    try:
        request, config, ranks = _asked(given)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    console = Console(stderr=given["as_json"])
    found = _compared(request, config, ranks, console)
    if given["as_json"]:
        packages = {package.name: package.version for package in versions()}
        report = {**found.to_dict(), "torch": torch.__version__, "packages": packages}
        click.echo(json.dumps(report, indent=2))
    else:
        console.print(found.table())
        console.print(found.verdict(), highlight=False)
    sys.exit(0 if found.passed else 1)


def _asked(given: dict[str, Any]) -> tuple[PipelineRequest, ParallelConfig, int]:
    """Everything that can be known before a weight is loaded.

    Raises:
        ParallelConfigError: It cannot work.
    """
    facts = ModelFacts.from_folder(given["model"])
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
    return request, config, ranks


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
            raise ParallelError(first_failure(error)) from None
        return [
            (VerifiedRank(**asdict(found[rank])), torch.load(Path(folder) / f"rank{rank}.pt"))
            for rank in range(ranks)
        ]
