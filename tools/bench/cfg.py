"""Guidance on two ranks beside one process and diffusers, in whole denoising loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from bench.cfg_case import CASES, GuidedCase, race_case
from bench.cfg_contestants import BRANCHES, GuidanceContestant, guidance_contestants
from bench.command import check_known, common_options, conclude, progress_bar, save
from bench.contestants import pick
from bench.harness import Harness
from bench.ready import steps_of
from bench.report import WIDTH
from bench.results import Report

QUICK_ROWS: Final = ("demo-256",)
QUICK_ROUNDS: Final = 5
ROUNDS: Final = 9


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    cases: tuple[GuidedCase, ...]
    contestants: tuple[GuidanceContestant, ...]
    rounds: int
    json: Path | None
    plot: Path | None


@click.command()
@common_options(rounds=ROUNDS, modes="branches,omni-sp:ulysses", quick="One row, few rounds.")
def main(list_rows: bool, **given: Any) -> None:
    """Compare ways to compute both branches of guidance: in turn, as a batch, or on two ranks.

    On two ranks: a branch on each (omni-cfgp), or every branch with its sequence split (omni-sp,
    and diffusers' context parallelism). What is timed is a pipeline's denoising loop, by step,
    without text encoders and VAE. Every rank is a process with one thread. Contestants take turns
    round by round; numbers are medians over the rounds, and ratios are taken within a round.
    """
    console = Console(width=WIDTH)
    if list_rows:
        for case in CASES.values():
            console.print(f"{case.name:<20} {case.title}", highlight=False)
        return
    try:
        options = parse(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    conclude(run(options), console, options.plot)


def parse(given: Mapping[str, Any]) -> Options:
    """Check what the command line says.

    Raises:
        ValueError: Something in it is unknown.
    """
    quick = given["quick"]
    rows = given["rows"] or (QUICK_ROWS if quick else tuple(CASES))
    check_known(rows, CASES)
    return Options(
        tuple(CASES[name] for name in rows),
        tuple(pick(guidance_contestants(), given["modes"], BRANCHES)),
        given["rounds"] or (QUICK_ROUNDS if quick else ROUNDS),
        given["json_path"],
        given["plot_path"],
    )


def run(options: Options) -> Report:
    """Measure everything; what is done is in the JSON file after each case."""
    report = Report("guidance on two ranks")
    steps = steps_of(len(options.contestants), options.rounds) * len(options.cases)
    with progress_bar(steps) as bar, Harness(bar.at) as harness:
        for case in options.cases:
            with bar.part(case.name, report):
                report.cases.append(
                    harness.run(race_case, BRANCHES, case, options.contestants, options.rounds)
                )
            save(report, options.json)
    return report
