"""Sequence parallelism beside diffusers' own, on the same transformers in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from bench import host_time, sp_case
from bench.command import (
    carry_out,
    check_known,
    common_options,
    names,
    positive,
    progress_bar,
    save,
)
from bench.contestants import Contestant, chosen
from bench.harness import Harness
from bench.models import FAMILIES
from bench.ready import steps_of
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


@click.command()
@common_options(rounds=ROUNDS, modes="ulysses,diffusers:ring", quick="One short row, few rounds.")
@click.option("--model", callback=names, help="Only rows of these: flux, qwen, wan.")
@click.option("--tokens", callback=names, help="These numbers of tokens instead of the rows.")
@click.option("--ranks", callback=names, default="2", show_default=True, help="E.g. 2,4.")
@click.option("--long", is_flag=True, help="Rows of 8192 tokens too.")
@click.option("--host/--no-host", default=True, help="Measure the host's time too.")
def main(**given: Any) -> None:
    """Compare single process, omni-sp in every mode and diffusers' context parallelism.

    Every rank is a process with one thread. Contestants take turns round by round; numbers are
    medians over the rounds, and ratios are taken within a round.
    """
    carry_out(given, (*CASES.values(), *LONG_CASES.values()), parse, run)


def parse(given: Mapping[str, Any]) -> Options:
    """Check what the command line says.

    Raises:
        ValueError: Something in it is unknown, or nothing is left to run.
    """
    quick, rows, tokens = given["quick"], given["rows"], given["tokens"]
    if quick and not (rows or tokens):
        rows = QUICK_ROWS
    cases = choose(rows, given["model"], tokens, given["long"])
    degrees = tuple(positive("--ranks", text, least=2) for text in given["ranks"])
    for degree in degrees:
        chosen(degree, given["modes"])
    return Options(
        cases,
        degrees,
        given["rounds"] or (QUICK_ROUNDS if quick else ROUNDS),
        given["modes"],
        tuple(dict.fromkeys(case.family for case in cases)) if given["host"] else (),
        given["json_path"],
    )


def choose(
    rows: Sequence[str], models: Sequence[str], tokens: Sequence[str], long: bool = False
) -> tuple[Case, ...]:
    """The cases that rows, or models and numbers of tokens, name.

    Raises:
        ValueError: A name is unknown, a number is none, or nothing is left.
    """
    known = {**CASES, **LONG_CASES}
    check_known(rows, known)
    check_known(models, FAMILIES)
    if tokens:
        if rows:
            msg = "--rows and --tokens exclude each other: a row has its number of tokens"
            raise ValueError(msg)
        lengths = [positive("--tokens", text, least=10) for text in tokens]
        return tuple(sp_case.case_of(m, n) for m in models or FAMILIES for n in lengths)
    wanted = rows or (*CASES, *(LONG_CASES if long else ()))
    cases = tuple(known[name] for name in wanted if not models or known[name].family in models)
    if not cases:
        msg = f"none of the rows {', '.join(wanted)} is of {', '.join(models)}"
        raise ValueError(msg)
    return cases


def run(options: Options) -> Report:
    """Measure everything; what is done is in the JSON file after each case."""
    report = Report("sequence parallelism")
    teams = {ranks: chosen(ranks, options.modes) for ranks in options.ranks}
    with progress_bar(_steps(options, teams)) as bar, Harness(bar.at) as harness:
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
                save(report, options.json)
            for case in options.cases:
                with bar.part(f"{case.name} on {ranks} ranks", report):
                    report.cases.append(
                        harness.run(sp_case.race_case, ranks, case, team, options.rounds)
                    )
                save(report, options.json)
    return report


def _steps(options: Options, teams: dict[int, list[Contestant]]) -> int:
    cases = sum(steps_of(len(team), options.rounds) for team in teams.values())
    return cases * len(options.cases) + host_time.STEPS * len(options.host) * len(teams)
