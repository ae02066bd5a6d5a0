"""``omni-parallel generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from omni_parallel.completion.layouts import complete_layout
from omni_parallel.dtypes import DTYPES
from omni_parallel.reported_command import Outcome, ReportedCommand

LAUNCHERS = ("torch", "ray")


@click.command(cls=ReportedCommand)
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be repeated.")
@click.option("--negative-prompt", help="What guidance leads away from.")
@click.option("--guidance", type=float, help="Its scale.  [default: the pipeline's]")
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    help="What the ranks share.",
    shell_complete=complete_layout,
)
@click.option(
    "--nproc", type=click.IntRange(1), help="Ranks on this host; with Ray, on all of them."
)
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where hosts meet: one of them.")
@click.option(
    "--launcher",
    type=click.Choice(LAUNCHERS),
    default="torch",
    show_default=True,
    help="What starts the ranks: torch's elastic agent, or Ray on the cluster of RAY_ADDRESS, else "
    "on this host.",
)
@click.option("--steps", type=click.IntRange(1), help="[default: the pipeline's]")
@click.option("--size", metavar="WIDTHxHEIGHT", help="Pixels.  [default: the pipeline's]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: bfloat16; float32 on the CPU]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("omni-parallel.png"),
    show_default=True,
    help="File: .png, .jpg, .webp; of a video .gif or .mp4.",
)
def generate(**given: Any) -> Outcome:
    """Generate images or videos with MODEL on several ranks.

    MODEL is a folder that a pipeline of diffusers was saved to, or its name on the hub. On several
    hosts, give the same command on each of them; the first rank's host has the files. With Ray,
    give it once; this host has them.
    """
    from omni_group_coordinator import ParallelConfigError
    from omni_parallel.generate.generation import generated

    try:
        found = generated(given)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    if not given["as_json"]:
        for file in found["files"]:
            click.echo(f"wrote {file}")
    return Outcome(found)
