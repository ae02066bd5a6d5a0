"""Whole pipelines on two ranks, from noise to pixels, beside one process and diffusers."""

from __future__ import annotations

from typing import Any, Final

import click

from bench.command import carry_out, common_options, parse_rows, race_rows
from bench.e2e_case import CASES, race_case
from bench.e2e_contestants import RANKS, whole_contestants

QUICK_ROWS: Final = ("flux-512",)
QUICK_ROUNDS: Final = 3
ROUNDS: Final = 5


@click.command()
@common_options(rounds=ROUNDS, modes="auto,ulysses", quick="One row, few rounds.")
def main(**given: Any) -> None:
    """Compare ways to make one image or video on two ranks: denoising and decoding.

    This product's layouts, `omni_parallel.parallelize` with each, and diffusers' context
    parallelism, which leaves the autoencoder to every rank. Prompts come in as embeddings. Every
    rank is a process with one thread. Contestants take turns round by round; numbers are medians
    over the rounds, and ratios are taken within a round.
    """
    quick = given["quick"]
    usual = QUICK_ROWS if quick else tuple(CASES)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    carry_out(
        given,
        CASES.values(),
        lambda given: parse_rows(given, CASES, usual, whole_contestants(), RANKS, rounds),
        lambda rows: race_rows("whole pipelines on two ranks", rows, race_case),
    )
