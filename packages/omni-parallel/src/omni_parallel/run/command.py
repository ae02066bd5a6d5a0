"""``omni-parallel run``."""

from __future__ import annotations

from pathlib import Path

import click

from omni_group_coordinator import ParallelConfigError
from omni_parallel.launching.hosts import nodes_for, ranks_here
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
    try:
        nodes = nodes_for(nnodes, rdzv_endpoint, "omni-parallel")
        ranks = ranks_here(nproc, _needed(layout, nproc, nnodes), nnodes)
    except ParallelConfigError as error:
        raise click.UsageError(str(error)) from None
    if not ranks:
        msg = "there is no accelerator to count ranks by; say how many: --nproc 2"
        raise click.UsageError(msg)
    run_script(
        ScriptRun(
            script=script,
            arguments=arguments,
            ranks=ranks,
            layout=layout,
            nodes=nodes,
            log_dir=log_dir,
            everything=all_output,
        )
    )


def _needed(layout: str | None, nproc: int | None, nnodes: int) -> int:
    """Ranks that the layout needs on all hosts; 0: as many as there are."""
    if layout is None or layout == "auto":
        return 0
    try:
        config = ParallelConfig.of(layout)
        if nproc is not None:
            config.layout(nproc * nnodes)
    except ParallelConfigError as error:
        raise click.BadParameter(str(error), param_hint="--layout") from None
    return config.ranks
