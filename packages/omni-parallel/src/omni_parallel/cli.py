"""The command ``omni-parallel``."""

from __future__ import annotations

import signal
import sys

import click
from rich.console import Console

from omni_parallel.__about__ import __version__

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def commands() -> click.Group:
    """The command with its sub-commands; torch, which they need, is slow to import."""
    from omni_parallel.demo.command import demo
    from omni_parallel.doctor.command import doctor
    from omni_parallel.generate.command import generate
    from omni_parallel.run.command import run
    from omni_parallel.verify.command import verify

    group = click.Group("omni-parallel", help="Run diffusion models on several ranks.")
    for command in (demo, generate, run, verify, doctor):
        group.add_command(command)
    return click.version_option(__version__, package_name="omni-parallel")(group)


def main() -> None:
    """Run the command; mistakes of the user end with a message, not with a traceback."""
    try:
        # In here, so that Ctrl-C during the import ends as cleanly as later.
        from omni_group_coordinator import ParallelError

        try:
            sys.exit(commands().main(standalone_mode=False))
        except ParallelError as error:
            Console(stderr=True).print(
                f"error: {error}", markup=False, highlight=False, soft_wrap=True
            )
            sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that a second one could end
        Console(stderr=True).print("interrupted; every rank has ended")
        sys.exit(INTERRUPTED)
