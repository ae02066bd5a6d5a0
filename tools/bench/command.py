"""What the commands of all benchmarks share: options, a progress bar, and how a run ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.harness import BenchError
from bench.plot import plot
from bench.report import Tables, case_parts, show
from bench.results import Report

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


# -- options -----------------------------------------------------------------------------------


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Callback of an option that takes names, separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else ()


def common_options(*, rounds: int, modes: str, quick: str) -> Callable[[CommandT], CommandT]:
    """The options that every benchmark has.

    Args:
        rounds: Default number of rounds.
        modes: An example for ``--modes``.
        quick: What ``--quick`` does.
    """
    path = click.Path(dir_okay=False, path_type=Path)
    options = (
        click.option("--rows", callback=names, help="Rows, separated by commas; see --list."),
        click.option("--rounds", type=click.IntRange(min=1), help=f"Default: {rounds}."),
        click.option("--modes", callback=names, help=f"E.g. {modes}; default: every one."),
        click.option("--quick", is_flag=True, help=quick),
        click.option("--json", "json_path", type=path, help="Write samples and ratios here."),
        click.option("--plot", "plot_path", type=path, help="Draw speed-ups here."),
        click.option("--list", "list_rows", is_flag=True, help="Name the rows and stop."),
    )

    def decorate(command: CommandT) -> CommandT:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def check_known(found: Iterable[str], legal: Collection[str]) -> None:
    """Check names that somebody typed.

    Raises:
        ValueError: One is unknown; lists the legal ones.
    """
    if unknown := [name for name in found if name not in legal]:
        msg = f"{unknown[0]!r} is unknown; legal: {', '.join(legal)}"
        raise ValueError(msg)


def positive(option: str, text: str, least: int) -> int:
    """A number that somebody typed.

    Raises:
        ValueError: It is none, or too small.
    """
    if not text.isdigit() or int(text) < least:
        msg = f"{option} takes whole numbers of at least {least}; got {text!r}"
        raise ValueError(msg)
    return int(text)


# -- the run -----------------------------------------------------------------------------------


class Bar:
    """A progress bar over all parts, which redraws too seldom to disturb what is measured."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task, self._before, self._now = progress, task, 0, 0

    def at(self, steps: int) -> None:
        """Show that a part has done this many steps."""
        self._now = steps
        self._progress.update(self._task, completed=self._before + steps, refresh=True)

    @contextmanager
    def part(self, name: str, report: Report) -> Iterator[None]:
        """Name what runs now; a failure of its ranks is a line of the report."""
        self._progress.update(self._task, description=name, refresh=True)
        try:
            yield
        except BenchError as error:
            report.failures[name] = str(error)
        self._before += self._now
        self._now = 0


@contextmanager
def progress_bar(steps: int) -> Iterator[Bar]:
    """A bar on the terminal within the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        yield Bar(progress, progress.add_task("starting", total=steps))


def save(report: Report, path: Path | None) -> None:
    """Write what is done so far, if that was asked for."""
    if path is not None:
        report.write(path)


def conclude(
    report: Report, console: Console, picture: Path | None, tables: Tables = case_parts
) -> None:
    """Print a report and draw it; ends with an error if some ranks failed."""
    show(report, console, tables)
    if picture is not None and report.cases:
        plot(report, picture)
    if report.failures:
        sys.exit(1)
