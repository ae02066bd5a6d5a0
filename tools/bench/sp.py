"""Sequence parallelism beside diffusers' own, on the same transformers in the same run."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import host_time, sp_case
from bench.contestants import Contestant, chosen
from bench.harness import BenchError, Harness
from bench.models import FAMILIES
from bench.plot import plot
from bench.report import WIDTH, show
from bench.results import Report
from bench.sp_case import CASES, LONG_CASES, Case

QUICK_ROWS: Final = ("flux-320",)
QUICK_ROUNDS: Final = 5
ROUNDS: Final = 15
_HOST_ROUNDS_FACTOR: Final = 4  # a forward of the host's measurement takes milliseconds


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    cases: tuple[Case, ...]
    ranks: tuple[int, ...]
    rounds: int
    modes: tuple[str, ...]
    host: tuple[str, ...]
    """Models whose host time is measured."""
    json: Path | None
    plot: Path | None


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else ()


@click.command()
@click.option("--rows", callback=_names, help="Rows, separated by commas; see --list.")
@click.option("--model", callback=_names, help="Only rows of these: flux, qwen, wan.")
@click.option("--tokens", callback=_names, help="These numbers of tokens instead of the rows.")
@click.option("--ranks", callback=_names, default="2", show_default=True, help="E.g. 2,4.")
@click.option("--rounds", type=click.IntRange(min=1), help=f"Default: {ROUNDS}.")
@click.option("--modes", callback=_names, help="E.g. ulysses,diffusers:ring; default: every one.")
@click.option("--long", is_flag=True, help="Rows of 8192 tokens too.")
@click.option("--quick", is_flag=True, help="One short row and few rounds.")
@click.option("--host/--no-host", default=True, help="Measure the host's time too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--list", "list_rows", is_flag=True, help="Name the rows and stop.")
def main(list_rows: bool, **given: Any) -> None:
    """Compare single process, omni-sp in every mode and diffusers' context parallelism.

    Every rank is a process with one thread. Contestants take turns round by round; numbers are
    medians over the rounds, and ratios are taken within a round.
    """
    console = Console(width=WIDTH)
    if list_rows:
        for case in (*CASES.values(), *LONG_CASES.values()):
            console.print(f"{case.name:<20} {case.title}", highlight=False)
        return
    try:
        options = parse(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    report = run(options)
    show(report, console)
    if options.plot is not None and report.cases:
        plot(report, options.plot)
    if report.failures:
        sys.exit(1)


def parse(given: Mapping[str, Any]) -> Options:
    """Check what the command line says.

    Raises:
        ValueError: Something in it is unknown, or nothing is left to run.
    """
    quick, rows, tokens = given["quick"], given["rows"], given["tokens"]
    if quick and not (rows or tokens):
        rows = QUICK_ROWS
    cases = choose(rows, given["model"], tokens, given["long"])
    degrees = tuple(_positive("--ranks", text, least=2) for text in given["ranks"])
    for degree in degrees:
        chosen(degree, given["modes"])
    return Options(
        cases,
        degrees,
        given["rounds"] or (QUICK_ROUNDS if quick else ROUNDS),
        given["modes"],
        tuple(dict.fromkeys(case.family for case in cases)) if given["host"] else (),
        given["json_path"],
        given["plot_path"],
    )


def choose(
    rows: Sequence[str], models: Sequence[str], tokens: Sequence[str], long: bool = False
) -> tuple[Case, ...]:
    """The cases that rows, or models and numbers of tokens, name.

    Raises:
        ValueError: A name is unknown, a number is none, or nothing is left.
    """
    known = {**CASES, **LONG_CASES}
    _check_known(rows, known)
    _check_known(models, FAMILIES)
    if tokens:
        if rows:
            msg = "--rows and --tokens exclude each other: a row has its number of tokens"
            raise ValueError(msg)
        lengths = [_positive("--tokens", text, least=10) for text in tokens]
        return tuple(sp_case.case_of(m, n) for m in models or FAMILIES for n in lengths)
    names = rows or (*CASES, *(LONG_CASES if long else ()))
    cases = tuple(known[name] for name in names if not models or known[name].family in models)
    if not cases:
        msg = f"none of the rows {', '.join(names)} is of {', '.join(models)}"
        raise ValueError(msg)
    return cases


def run(options: Options) -> Report:
    """Measure everything; what is done is in the JSON file after each case."""
    report = Report("sequence parallelism")
    teams = {ranks: chosen(ranks, options.modes) for ranks in options.ranks}
    with _bar(_steps(options, teams)) as bar, Harness(bar.at) as harness:
        for ranks, team in teams.items():
            for family in options.host:
                with bar.part(f"host time of {family}", report):
                    report.host.append(
                        harness.run(
                            host_time.host_case,
                            1,
                            family,
                            ranks,
                            team,
                            options.rounds * _HOST_ROUNDS_FACTOR,
                        )
                    )
                _save(report, options)
            for case in options.cases:
                with bar.part(f"{case.name} on {ranks} ranks", report):
                    report.cases.append(
                        harness.run(sp_case.race_case, ranks, case, team, options.rounds)
                    )
                _save(report, options)
    return report


def _steps(options: Options, teams: dict[int, list[Contestant]]) -> int:
    cases = sum(sp_case.steps_of(team, options.rounds) for team in teams.values())
    return cases * len(options.cases) + host_time.STEPS * len(options.host) * len(teams)


def _save(report: Report, options: Options) -> None:
    if options.json is not None:
        report.write(options.json)


def _check_known(names: Iterable[str], legal: Collection[str]) -> None:
    if unknown := [name for name in names if name not in legal]:
        msg = f"{unknown[0]!r} is unknown; legal: {', '.join(legal)}"
        raise ValueError(msg)


def _positive(option: str, text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        msg = f"{option} takes whole numbers of at least {least}; got {text!r}"
        raise ValueError(msg)
    return int(text)


class _Bar:
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
def _bar(steps: int) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        yield _Bar(progress, progress.add_task("starting", total=steps))
