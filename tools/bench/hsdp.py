"""Weights that ranks share beside whole ones and torch's defaults: memory and time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from bench.command import (
    Bar,
    Rows,
    carry_out,
    common_options,
    names,
    parse_rows,
    positive,
    progress_bar,
    save,
)
from bench.harness import Harness
from bench.hsdp_case import (
    CASES,
    QUICK_CASES,
    ShardedCase,
    memory_case,
    race_case,
    write_checkpoint,
)
from bench.hsdp_contestants import ShardingContestant, sharding_contestants
from bench.hsdp_report import sharded_parts, write_markdown
from bench.hsdp_results import Memory
from bench.ready import steps_of
from bench.results import Report

QUICK_ROUNDS: Final = 3
ROUNDS: Final = 9
Team = Rows[ShardedCase, ShardingContestant]


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        teams: The rows with the contestants, for each number of ranks.
        markdown: Where the table for the docs goes.
    """

    teams: tuple[Team, ...]
    markdown: Path | None


@click.command()
@common_options(rounds=ROUNDS, modes="defaults,prefetch-1,gathered", quick="One small row.")
@click.option("--ranks", callback=names, default="1,2,4", show_default=True, help="E.g. 2,4.")
@click.option(
    "--markdown",
    "markdown_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the table of memory and latency here, as the guide has it.",
)
def main(**given: Any) -> None:
    """Compare ways to have a model of 400 MB with random weights on several ranks.

    Whole on each; sharded by torch's fully_shard with its defaults, once it is loaded; and by
    omni-hsdp with each policy, loaded by shares, from files that diffusers wrote. Every rank
    computes the whole forward: what there is to win is memory. Every rank is a process with one
    thread. Contestants take turns round by round; numbers are medians over the rounds, and ratios
    are taken within a round: times over that of the whole model on all ranks at once.
    "gathered" is a step of a request after its first.

    Memory is measured by each contestant in fresh processes, beyond what these held after
    imports: the peak of resident memory, and in brackets that of its part in no file, which is
    sampled. Files are mapped into memory, from which the system takes them back when it needs to.
    """
    carry_out(given, [*CASES.values(), *QUICK_CASES.values()], parse, run, sharded_parts)


def parse(given: Mapping[str, Any]) -> Options:
    """Check what the command line says.

    Raises:
        ValueError: Something in it is unknown.
    """
    known, quick = {**CASES, **QUICK_CASES}, given["quick"]
    usual, rounds = (QUICK_CASES, QUICK_ROUNDS) if quick else (CASES, ROUNDS)
    teams = []
    everyone = {c.mode for c in sharding_contestants(2)}
    for text in given["ranks"]:
        ranks = positive("--ranks", text, least=1)
        here = sharding_contestants(ranks)
        modes = given["modes"]
        if ranks == 1 and everyone.issuperset(modes):  # one rank has fewer
            modes = tuple(m for m in modes if m in {c.mode for c in here})
        teams.append(parse_rows({**given, "modes": modes}, known, [*usual], here, ranks, rounds))
    return Options(tuple(teams), given["markdown_path"])


def run(options: Options) -> Report:
    """Measure everything; what is done is in the files after each case."""
    report = Report("sharded weights")
    with progress_bar(sum(map(_steps, options.teams))) as bar:
        for team in options.teams:
            for case in team.cases:
                with tempfile.TemporaryDirectory(prefix="bench-weights-") as folder:
                    _measure(team, case, folder, bar, report)
                save(report, team.json)
                if options.markdown is not None:
                    write_markdown(report.cases, options.markdown)
    return report


def _measure(team: Team, case: ShardedCase, folder: str, bar: Bar, report: Report) -> None:
    """One row on one number of ranks."""
    name = f"{case.name} on {team.ranks} ranks"
    files = f"files of {name}"
    with bar.part(files, report), Harness(bar.at) as harness:
        harness.run(write_checkpoint, 1, case, folder)
    if files in report.failures:
        return
    memory: dict[str, Memory] = {}
    for contestant in team.contestants:
        with bar.part(f"memory of {contestant.name}, {name}", report), Harness(bar.at) as harness:
            memory[contestant.name] = harness.run(memory_case, team.ranks, case, contestant, folder)
    with bar.part(name, report), Harness(bar.at) as harness:
        report.cases.append(
            harness.run(race_case, team.ranks, case, team.contestants, team.rounds, folder, memory)
        )


def _steps(team: Team) -> int:
    members = len(team.contestants)
    return (members + steps_of(members, team.rounds)) * len(team.cases)
