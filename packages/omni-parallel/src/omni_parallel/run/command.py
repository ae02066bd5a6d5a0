"""``omni-parallel run``."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel.launching.processes import Nodes
from omni_parallel.run.script import ScriptRun, run_script
from omni_parallel.v1 import ParallelConfig


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--nproc",
    type=click.IntRange(1),
    help="Ranks on this host.  [default: what the layout needs, or the number of accelerators]",
)
@click.option(
    "--layout",
    metavar="NAME=DEGREE,...",
    help="What ranks share where the script calls parallelize without a configuration.",
)
@click.option("--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Hosts.")
@click.option(
    "--rdzv-endpoint",
    metavar="HOST:PORT",
    help="Where the hosts meet: one of them, the same on all.",
)
@click.option(
    "--log-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps what the ranks after the first print.",
)
@click.option("--all-output", is_flag=True, help="Show what every rank prints.")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    nproc: int | None,
    layout: str | None,
    nnodes: int,
    rdzv_endpoint: str | None,
    log_dir: Path | None,
    all_output: bool,
    script: Path,
    arguments: tuple[str, ...],
) -> None:
    """Run a script on several ranks, as torchrun does.

    Rank 0 has the terminal. When a rank fails, all end, and what the first one said comes first.
    On several hosts, give the same command on each of them.
    """
    if nnodes > 1 and rdzv_endpoint is None:
        msg = f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT, the same on every host"
        raise click.UsageError(msg)
    nodes = Nodes(nnodes, rdzv_endpoint or "localhost:0", "omni-parallel" if nnodes > 1 else "")
    run_script(
        ScriptRun(
            script=script,
            arguments=arguments,
            ranks=_ranks(nproc, layout, nnodes),
            layout=layout,
            nodes=nodes,
            log_dir=log_dir,
            everything=all_output,
        )
    )


def _ranks(nproc: int | None, layout: str | None, nnodes: int) -> int:
    """Ranks on this host."""
    needed = 0
    if layout is not None and layout != "auto":
        try:
            config = ParallelConfig.of(layout)
            needed = config.ranks
            if nproc is not None:
                config.layout(nproc * nnodes)
        except ParallelConfigError as error:
            raise click.BadParameter(str(error), param_hint="--layout") from None
    if nproc is not None:
        return nproc
    if needed % nnodes:
        msg = f"{needed} ranks of the layout on {nnodes} hosts; legal: --nproc for each of them"
        raise click.UsageError(msg)
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not needed and not found:
        msg = "there is no accelerator to count ranks by; say how many: --nproc 2"
        raise click.UsageError(msg)
    return needed // nnodes or found
