"""``omni-parallel demo``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from omni_parallel.completion.layouts import complete_layout
from omni_parallel.demo.limits import DEFAULT_RANKS, MAX_RANKS, MAX_SIZE
from omni_parallel.reported_command import Outcome, ReportedCommand

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


@click.command(cls=ReportedCommand)
@click.option(
    "--ranks",
    type=click.IntRange(1, MAX_RANKS),
    help="Ranks of the parallel run.  [default: as many as the layout needs, "
    f"{DEFAULT_RANKS} without one]",
)
@click.option(
    "--layout",
    metavar="NAME=DEGREE,...",
    shell_complete=complete_layout,
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
def demo(**given: Any) -> Outcome:
    """Draw pictures on one process and on several ranks, and compare them.

    Uses a small trained model that comes with the package. Exits with 1 when the pictures of
    the ranks differ from those of the single process by more than the tolerance, or visibly with
    a layout that approximates.
    """
    from omni_parallel.demo.demonstration import demonstrate

    console = Console(stderr=given["as_json"], markup=False, emoji=False)
    return demonstrate(given, console)
