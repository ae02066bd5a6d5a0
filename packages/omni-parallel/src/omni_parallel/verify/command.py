"""``omni-parallel verify``."""

from __future__ import annotations

from typing import Any

import click

from omni_parallel.completion.layouts import complete_layout
from omni_parallel.dtypes import DTYPES
from omni_parallel.reported_command import Outcome, ReportedCommand


@click.command(cls=ReportedCommand)
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    help="What the ranks share.",
    shell_complete=complete_layout,
)
@click.option("--nproc", type=click.IntRange(2, 64), help="Ranks, for --layout auto.  [default: 2]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
def verify(**given: Any) -> Outcome:
    """Run a few steps of MODEL on one process and on a layout, and compare.

    MODEL is a folder that a pipeline of diffusers was saved to. Exits with 1 when the results
    differ by more than the tolerance of the dtype, or a rank failed.
    """
    import torch
    from rich.console import Console

    from omni_group_coordinator import ParallelConfigError
    from omni_parallel.v1 import versions
    from omni_parallel.verify.verification import verified

    console = Console(stderr=given["as_json"], markup=False, emoji=False)
    try:
        found = verified(given, console)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    if not given["as_json"]:
        console.print(found.table())
        console.print(found.verdict(), highlight=False)
    packages = {package.name: package.version for package in versions()}
    keys = {**found.to_dict(), "torch": torch.__version__, "packages": packages}
    return Outcome(keys, found.passed)
