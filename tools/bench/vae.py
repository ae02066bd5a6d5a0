"""Decoding on two ranks beside one process, diffusers' tiles and DistVAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from bench.command import check_known, common_options, conclude, progress_bar, save
from bench.contestants import pick
from bench.harness import Harness
from bench.ready import steps_of
from bench.report import WIDTH
from bench.results import Report
from bench.vae_case import CASES, LONG_CASES, DecodeCase, race_case
from bench.vae_contestants import RANKS, VaeContestant, vae_contestants
from bench.vae_report import decode_parts

QUICK_ROWS: Final = ("kl-256",)
QUICK_ROUNDS: Final = 9
ROUNDS: Final = 5


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    cases: tuple[DecodeCase, ...]
    contestants: tuple[VaeContestant, ...]
    rounds: int
    json: Path | None
    plot: Path | None


@click.command()
@common_options(rounds=ROUNDS, modes="height,omni-vae-patch:tiles", quick="One small row.")
@click.option("--long", is_flag=True, help="The row of a longer video too.")
def main(list_rows: bool, **given: Any) -> None:
    """Compare ways to decode a latent by an autoencoder with random weights, on two ranks.

    The floor is what each rank takes for its own half if nothing is exchanged, which is fast and
    wrong. Then diffusers' own tiles on one process; omni-vae-patch, exact along either side and by
    the same tiles; and DistVAE, if it is installed. Every rank is a process with one thread.
    Contestants take turns round by round; numbers are medians over the rounds, and ratios are taken
    within a round.

    Memory is the largest sum of tensors that a decode made and that were alive at once, on the rank
    that had most, without weights and without what operators use for themselves. Errors are the
    largest difference from the whole decode, relative to its largest value; the peak of PSNR is the
    range of its values.
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
    conclude(run(options), console, options.plot, decode_parts)


def parse(given: Mapping[str, Any]) -> Options:
    """Check what the command line says.

    Raises:
        ValueError: Something in it is unknown.
    """
    quick, known = given["quick"], {**CASES, **LONG_CASES}
    usual = QUICK_ROWS if quick else tuple(CASES)
    rows = given["rows"] or (*usual, *(LONG_CASES if given["long"] else ()))
    check_known(rows, known)
    return Options(
        tuple(known[name] for name in rows),
        tuple(pick(vae_contestants(), given["modes"], RANKS)),
        given["rounds"] or (QUICK_ROUNDS if quick else ROUNDS),
        given["json_path"],
        given["plot_path"],
    )


def run(options: Options) -> Report:
    """Measure everything; what is done is in the JSON file after each case."""
    report = Report("decoding on two ranks")
    steps = steps_of(len(options.contestants), options.rounds) * len(options.cases)
    with progress_bar(steps) as bar, Harness(bar.at) as harness:
        for case in options.cases:
            with bar.part(case.name, report):
                report.cases.append(
                    harness.run(race_case, RANKS, case, options.contestants, options.rounds)
                )
            save(report, options.json)
    return report
