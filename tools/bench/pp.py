"""Stages on two ranks beside one process and Ulysses, in whole denoising loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import click

from bench.command import Rows, carry_out, common_options, parse_rows, race_rows
from bench.pp_case import CASES, OTHER_CASES, QUICK_CASES, StagedCase, race_case
from bench.pp_contestants import (
    ALONE,
    STAGES,
    StageContestant,
    stage_contestants,
)
from bench.pp_report import staged_parts

QUICK_ROUNDS: Final = 3
ROUNDS: Final = 5


@click.command()
@common_options(rounds=ROUNDS, modes="branches,virtual-2,single:unguided", quick="One small row.")
def main(**given: Any) -> None:
    """Compare what fills a pipeline of two stages, each with its own ideal.

    One image without guidance (plain), which leaves one rank idle; both branches of guidance, with
    1, 2 and 4 chunks on each rank; four images in a batch; two and three guided requests that run
    together; one image in 2 to 8 patches, whose first step is exact and counts as such in the
    ideal; and Ulysses, which splits tokens. What is timed is a pipeline's denoising loop,
    without text encoders and VAE. Every rank is a process with one thread. Stages are cut by the
    measured costs of blocks. Contestants take turns round by round; numbers are medians over the
    rounds, and ratios are taken within a round. An ideal counts idle stages and nothing else.
    """
    carry_out(
        given,
        [*CASES.values(), *OTHER_CASES.values()],
        parse,
        lambda rows: race_rows("stages on two ranks", rows, race_case),
        staged_parts,
    )


def parse(given: Mapping[str, Any]) -> Rows[StagedCase, StageContestant]:
    """Check what the command line says; one process takes part in all works that are asked for.

    Raises:
        ValueError: Something in it is unknown.
    """
    quick = given["quick"]
    known, usual = {**CASES, **OTHER_CASES, **QUICK_CASES}, tuple(QUICK_CASES if quick else CASES)
    rounds, everyone = QUICK_ROUNDS if quick else ROUNDS, stage_contestants()
    rows = parse_rows(given, known, usual, everyone, STAGES, rounds)
    works = {contestant.work for contestant in rows.contestants}
    team = [c for c in everyone if c in rows.contestants or (c.side == ALONE and c.work in works)]
    return replace(rows, contestants=tuple(team))
