"""What the commands of all benchmarks share: options, a progress bar, and how a run ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.contestants import Competitor, pick
from bench.harness import BenchError, Harness
from bench.plot import plot
from bench.ready import steps_of
from bench.report import WIDTH, Tables, case_parts, show
from bench.results import Report

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
OptionsT = TypeVar("OptionsT")
CaseT = TypeVar("CaseT")
ContestantT = TypeVar("ContestantT", bound=Competitor)


class Named(Protocol):
    """A row of a benchmark."""

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""

    @property
    def title(self) -> str:
        """What tables call it."""


@dataclass(frozen=True)
class Rows(Generic[CaseT, ContestantT]):
    """What a command line asks for, of a benchmark on one number of ranks."""

    cases: tuple[CaseT, ...]
    contestants: tuple[ContestantT, ...]
    ranks: int
    rounds: int
    json: Path | None


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


def parse_rows(
    given: Mapping[str, Any],
    known: Mapping[str, CaseT],
    usual: Sequence[str],
    everyone: Sequence[ContestantT],
    ranks: int,
    rounds: int,
) -> Rows[CaseT, ContestantT]:
    """Check what the command line says.

    Args:
        given: Of the command line.
        known: Every row, by name.
        usual: Rows if none are named.
        everyone: Every contestant.
        ranks: Number of ranks.
        rounds: If their number is not given.

    Raises:
        ValueError: Something in it is unknown.
    """
    rows = given["rows"] or usual
    check_known(rows, known)
    return Rows(
        tuple(known[name] for name in rows),
        tuple(pick(everyone, given["modes"], ranks)),
        ranks,
        given["rounds"] or rounds,
        given["json_path"],
    )


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


def race_rows(title: str, rows: Rows[Any, Any], race_case: Callable[..., Any]) -> Report:
    """Measure everything; what is done is in the JSON file after each case."""
    report = Report(title)
    steps = steps_of(len(rows.contestants), rows.rounds) * len(rows.cases)
    with progress_bar(steps) as bar, Harness(bar.at) as harness:
        for case in rows.cases:
            with bar.part(case.name, report):
                report.cases.append(
                    harness.run(race_case, rows.ranks, case, rows.contestants, rows.rounds)
                )
            save(report, rows.json)
    return report


def save(report: Report, path: Path | None) -> None:
    """Write what is done so far, if that was asked for."""
    if path is not None:
        report.write(path)


def carry_out(
    given: Mapping[str, Any],
    cases: Iterable[Named],
    parse: Callable[[Mapping[str, Any]], OptionsT],
    run: Callable[[OptionsT], Report],
    tables: Tables = case_parts,
) -> None:
    """Do what the command line says: name the rows, or run, print and draw.

    Ends with an error if some ranks failed.

    Args:
        given: Of the command line.
        cases: Every row there is.
        parse: Checks what was given; a `ValueError` is the user's mistake.
        run: Measures.
        tables: Of a case.
    """
    console = Console(width=WIDTH)
    if given["list_rows"]:
        for case in cases:
            console.print(f"{case.name:<20} {case.title}", highlight=False)
        return
    try:
        options = parse(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    report = run(options)
    show(report, console, tables)
    if given["plot_path"] is not None and report.cases:
        plot(report, given["plot_path"])
    if report.failures:
        sys.exit(1)
