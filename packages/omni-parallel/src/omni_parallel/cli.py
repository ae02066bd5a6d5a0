"""The command ``omni-parallel``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click
from rich.console import Console

from omni_parallel.__about__ import __version__

NAME = "omni-parallel"
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
TRACEBACK = "OMNI_PARALLEL_TRACEBACK"
"""The variable that asks for tracebacks of errors whose message is otherwise all that is shown."""

COMMANDS = {
    "demo": ("omni_parallel.demo.command", "Draw pictures on one process and on several ranks."),
    "generate": ("omni_parallel.generate.command", "Generate images or videos on several ranks."),
    "run": ("omni_parallel.run.command", "Run a script on several ranks, as torchrun does."),
    "plan": ("omni_parallel.plan.command", "Predict what each layout needs, before any runs."),
    "verify": ("omni_parallel.verify.command", "Compare a layout with one process."),
    "doctor": ("omni_parallel.doctor.command", "Try collectives, and name what is wrong."),
    "completion": ("omni_parallel.completion.command", "Print a script that completes commands."),
}
"""Sub-commands, of the same name in their modules, and what the list of them says."""


class LazyGroup(click.Group):
    """Sub-commands are imported when they are asked for: torch, which they need, is slow."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one; None: there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of sub-commands, none of which is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, said) for name, (_, said) in COMMANDS.items()])

    def shell_complete(
        self, ctx: click.Context, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Names of sub-commands, and options of this one."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=said)
            for name, (_, said) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def commands() -> click.Group:
    """The command with its sub-commands."""
    asking = f"{TRACEBACK}=1 in the environment shows where an error was raised, too."
    group = LazyGroup(NAME, help="Run diffusion models on several ranks.", epilog=asking)
    return click.version_option(__version__, package_name=NAME)(group)


def main() -> None:
    """Run the command; mistakes of the user end with a message, not with a traceback."""
    pressed = _noticed()
    try:
        sys.exit(_run())
    except (click.Abort, KeyboardInterrupt):
        _interrupted()
    except Exception as error:
        if pressed:  # an import that broke off raises what it likes
            _interrupted()
        if not isinstance(error, click.ClickException):
            raise
        _trace(error)
        error.show()
        sys.exit(error.exit_code)


def _noticed() -> list[int]:
    """A list that is no longer empty once Ctrl-C was pressed."""
    pressed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, say
        signal.signal(signal.SIGINT, handle)
    return pressed


def _interrupted() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that a second one could end
    Console(stderr=True).print("interrupted; every rank has ended")
    sys.exit(INTERRUPTED)


def _run() -> int:
    from omni_parallel.completion import shells

    shells.register()
    try:
        return int(commands().main(prog_name=NAME, standalone_mode=False) or 0)
    except click.Abort:  # a RuntimeError, at which torch may be imported in part
        raise
    except RuntimeError as error:
        from omni_group_coordinator import ParallelError  # a RuntimeError, and torch comes with it

        if not isinstance(error, ParallelError):
            raise
        _trace(error)
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        console.print(f"error: {error}", soft_wrap=True)
        return 1


def _trace(error: BaseException) -> None:
    """Show where an error was raised, if that is asked for, and those that it was made of."""
    if os.environ.get(TRACEBACK, "0") in ("", "0"):
        return
    one: BaseException | None = error
    while one is not None:
        one.__suppress_context__ = False  # of `raise ... from None`, which hides the first of them
        one = one.__cause__ or one.__context__
    traceback.print_exception(error)
