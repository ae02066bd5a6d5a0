"""``omni-parallel demo``."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.launch import RunResult, launch
from omni_parallel.demo.layout_option import (
    DEFAULT_RANKS,
    MAX_RANKS,
    check_config,
    choose_config,
)
from omni_parallel.demo.pipeline import MODEL, load_pipeline
from omni_parallel.demo.request import (
    MAX_SIZE,
    PROMPTS,
    DemoRequest,
    check_prompts,
    check_size,
)
from omni_parallel.demo.sheet import write_sheet
from omni_parallel.demo.table import comparison, layout_name, megabytes, verdict
from omni_parallel.launching.hosts import accelerators, device_for
from omni_parallel.v1 import ModelFacts, ParallelConfig, load_strategy

DEFAULT_OUT = Path("omni-parallel-demo.png")


class _Size(click.ParamType[tuple[int, int]]):
    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if match is None:
            self.fail(f"{value!r} is no size; give pixels as 128 or as 192x128", param, ctx)
        width = int(match[1])
        return width, int(match[2] or width)


@click.command()
@click.option(
    "--ranks",
    type=click.IntRange(1, MAX_RANKS),
    help="Ranks of the parallel run.  [default: as many as the layout needs, "
    f"{DEFAULT_RANKS} without one]",
)
@click.option(
    "--layout",
    metavar="NAME=DEGREE,...",
    help="What the ranks share: the guidance branches (cfg=2), the tokens of a picture (ulysses=2, "
    "ring=2), the blocks of the model (pp=2), its blocks and patches of a picture (pipefusion=2, "
    "an approximation), the rows of what is decoded (vae_patch=2), the weights (hsdp=2), or "
    "several of these (cfg=2,ulysses=2 on 4 ranks; hsdp and vae_patch add no ranks: "
    "ulysses=2,hsdp=2 on 2).  [default: the tokens]",
)
@click.option("--prompt", "prompts", multiple=True, help="What to draw; may be repeated.")
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Denoising steps.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of the first picture; each next one takes the next.",
)
@click.option(
    "--size",
    type=_Size(),
    default="128",
    show_default=True,
    help=f"Pixels, as 128 (what the model knows) or 192x128 (width x height), up to {MAX_SIZE}.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DEFAULT_OUT,
    show_default=True,
    help="PNG file for the sheet of pictures.",
)
def demo(
    ranks: int | None,
    layout: str | None,
    prompts: tuple[str, ...],
    steps: int,
    seed: int,
    size: tuple[int, int],
    out: Path,
) -> None:
    """Draw pictures on one process and on several ranks, and compare them.

    Uses a small trained model that comes with the package. Exits with 1 when the pictures of
    the ranks differ from those of the single process by more than the tolerance, or visibly with
    a layout that approximates.
    """
    console = Console()
    request = DemoRequest(
        prompts=prompts or PROMPTS, steps=steps, seed=seed, width=size[0], height=size[1]
    )
    _check_output(out)
    try:
        config, count = choose_config(ranks, layout)
        _check(request, config, count)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    device = _device_for(count, console)
    single, parallel = _run_both(request, config, count, device, console)
    _report(request, single, parallel, out, console)


def _device_for(ranks: int, console: Console) -> str | None:
    """The CPU where there are too few accelerators, and say so; else ``None``."""
    devices = accelerators()
    if 0 < devices < ranks:
        console.print(f"{ranks} ranks need as many accelerators, here is {devices}: using the CPU")
    return device_for(ranks)


def _check_output(out: Path) -> None:
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
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
) -> None:
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
    if parallel is None:
        return
    kept, said = verdict(parallel, single)
    console.print(said, soft_wrap=True)
    if not kept:
        raise click.exceptions.Exit(1)


def _title(run: RunResult) -> str:
    return "one process" if run.ranks == 1 else f"{run.ranks} ranks ({layout_name(run.config)})"
