"""Decoding on two ranks beside one process, diffusers' tiles and DistVAE."""

from __future__ import annotations

from typing import Any, Final

import click

from bench.command import carry_out, common_options, parse_rows, race_rows
from bench.vae_case import CASES, LONG_CASES, race_case
from bench.vae_contestants import RANKS, vae_contestants
from bench.vae_report import decode_parts

QUICK_ROWS: Final = ("kl-256",)
QUICK_ROUNDS: Final = 9
ROUNDS: Final = 5


@click.command()
@common_options(rounds=ROUNDS, modes="height,omni-vae-patch:tiles", quick="One small row.")
@click.option("--long", is_flag=True, help="The row of a longer video too.")
def main(**given: Any) -> None:
    """Compare ways to decode a latent by an autoencoder with random weights, on two ranks.

    The floor is what each rank takes for its own half if nothing is exchanged, which is fast and
    wrong; it attends to its own half alone, so it stands there again with as much attention as an
    exact decode has (+keys). Then diffusers' own tiles on one process; omni-vae-patch, exact
    along either side and by the same tiles; and DistVAE, if it is installed. Every rank is a
    process with one thread. Contestants take turns round by round; numbers are medians over the
    rounds, and ratios are taken within a round.

    Memory is the largest sum of tensors that a decode made and that were alive at once, on the rank
    that had most, without weights and without what operators use for themselves. Errors are the
    largest difference from the whole decode, relative to its largest value; the peak of PSNR is the
    range of its values.
    """
    quick, known = given["quick"], {**CASES, **LONG_CASES}
    usual = (*(QUICK_ROWS if quick else CASES), *(LONG_CASES if given["long"] else ()))
    rounds = QUICK_ROUNDS if quick else ROUNDS
    carry_out(
        given,
        known.values(),
        lambda given: parse_rows(given, known, usual, vae_contestants(), RANKS, rounds),
        lambda rows: race_rows("decoding on two ranks", rows, race_case),
        decode_parts,
    )
