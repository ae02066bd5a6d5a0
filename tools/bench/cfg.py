"""Guidance on two ranks beside one process and diffusers, in whole denoising loops."""

from __future__ import annotations

from typing import Any, Final

import click

from bench.cfg_case import CASES, race_case
from bench.cfg_contestants import BRANCHES, guidance_contestants
from bench.command import carry_out, common_options, parse_rows, race_rows

QUICK_ROWS: Final = ("demo-256",)
QUICK_ROUNDS: Final = 5
ROUNDS: Final = 9


@click.command()
@common_options(rounds=ROUNDS, modes="branches,omni-sp:ulysses", quick="One row, few rounds.")
def main(**given: Any) -> None:
    """Compare ways to compute both branches of guidance: in turn, as a batch, or on two ranks.

    On two ranks: a branch on each (omni-cfgp), or every branch with its sequence split (omni-sp,
    and diffusers' context parallelism). What is timed is a pipeline's denoising loop, by step,
    without text encoders and VAE. Every rank is a process with one thread. Contestants take turns
    round by round; numbers are medians over the rounds, and ratios are taken within a round.
    """
    quick = given["quick"]
    usual = QUICK_ROWS if quick else tuple(CASES)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    carry_out(
        given,
        CASES.values(),
        lambda given: parse_rows(given, CASES, usual, guidance_contestants(), BRANCHES, rounds),
        lambda rows: race_rows("guidance on two ranks", rows, race_case),
    )
