"""``omni-parallel doctor``."""

from __future__ import annotations

import click

from omni_parallel.reported_command import Outcome, ReportedCommand


@click.command(cls=ReportedCommand)
@click.option(
    "--nproc",
    type=click.IntRange(2, 64),
    help="Ranks of the self-test.  [default: one for each accelerator, 2 at least]",
)
def doctor(nproc: int | None, as_json: bool) -> Outcome:
    """Say what is here, try collectives on several ranks, and name what is wrong.

    Exits with 1 when ranks cannot work together, or packages do not go together.
    """
    from omni_parallel.doctor.examination import examine

    return examine(nproc, as_json)
