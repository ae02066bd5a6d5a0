"""``omni-parallel run``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from omni_parallel.completion.layouts import complete_layout
from omni_parallel.reported_command import Outcome, ReportedCommand


@click.command(
    cls=ReportedCommand,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option(
    "--nproc",
    type=click.IntRange(1),
    help="Ranks on this host.  [default: what the layout needs, or the number of accelerators]",
)
@click.option(
    "--layout",
    metavar="NAME=DEGREE,...",
    help="What ranks share where the script calls parallelize without a configuration.",
    shell_complete=complete_layout,
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
def run(**given: Any) -> Outcome:
    """Run a script on several ranks, as torchrun does.

    Rank 0 has the terminal. When a rank fails, all end, and what the first one said comes first.
    On several hosts, give the same command on each of them. With --json, which stands before the
    script, what rank 0 prints is in the object.
    """
    from omni_group_coordinator import ParallelConfigError
    from omni_parallel.launching.hosts import nodes_for, ranks_here
    from omni_parallel.run.script import ScriptRun, run_script

    if given["as_json"] and given["all_output"]:
        msg = "--all-output and --json do not go together; legal: --log-dir FOLDER with --json"
        raise click.UsageError(msg)
    try:
        nodes = nodes_for(given["nnodes"], given["rdzv_endpoint"], "omni-parallel")
        needed = _needed(given["layout"], given["nproc"], nodes.count)
        ranks = ranks_here(given["nproc"], needed, nodes.count)
        if not ranks:
            msg = "there is no accelerator to count ranks by; say how many: --nproc 2"
            raise click.UsageError(msg)
        output = run_script(
            ScriptRun(
                script=given["script"],
                arguments=given["arguments"],
                ranks=ranks,
                layout=given["layout"],
                nodes=nodes,
                log_dir=given["log_dir"],
                everything=given["all_output"],
                captured=given["as_json"],
            )
        )
    except ParallelConfigError as error:  # also of an endpoint that is none: no rank was started
        raise click.UsageError(str(error)) from None
    found = {name: given[name] for name in ("arguments", "layout")}
    ranks *= nodes.count
    return Outcome({"script": str(given["script"]), **found, "ranks": ranks, "output": output})


def _needed(layout: str | None, nproc: int | None, nnodes: int) -> int:
    """Ranks that the layout needs on all hosts; 0: as many as there are."""
    if layout is None or layout == "auto":
        return 0
    from omni_group_coordinator import ParallelConfigError
    from omni_parallel.v1 import ParallelConfig

    try:
        config = ParallelConfig.of(layout)
        if nproc is not None:
            config.layout(nproc * nnodes)
    except ParallelConfigError as error:
        raise click.BadParameter(str(error), param_hint="--layout") from None
    return config.ranks
