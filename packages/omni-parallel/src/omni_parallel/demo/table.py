"""The table of the demonstration: each run beside the single process."""

from __future__ import annotations

import math

from rich.table import Table

from omni_parallel.comparable import is_exact
from omni_parallel.demo.launch import RunResult
from omni_parallel.v1 import ParallelConfig

TOLERANCE = 1e-4
"""Largest difference of a pixel in [0, 1] that counts as the same picture, before quantisation."""

VISIBLE = 35.0
"""PSNR in dB below which a picture is seen to be another one than that beside it.

The guide to pipeline stages shows it with pictures of this model."""


def verdict(run: RunResult, single: RunResult) -> tuple[bool, str]:
    """Whether a run made the pictures of a single process, as far as it promises, and how far."""
    difference = run.difference(single)
    if is_exact(run.config):
        same = difference <= TOLERANCE
        said = "same pictures" if same else "DIFFERENT PICTURES"
        return same, (
            f"{said}: largest difference {difference:.1e} before quantisation to 8 bits, "
            f"tolerance {TOLERANCE:g}"
        )
    psnr = run.worst_psnr(single)
    alike = psnr >= VISIBLE
    what = "PipeFusion" if run.config.pipefusion > 1 else "vae_mode=tile"
    said = "similar pictures, not the same" if alike else "DIFFERENT PICTURES"
    return alike, (
        f"{said}, for {what} approximates: PSNR {psnr:.1f} dB in the picture that strays "
        f"farthest (below {VISIBLE:g} dB it is seen), largest difference {difference:.1e}"
    )


def comparison(single: RunResult, others: list[RunResult]) -> Table:
    """A table of 80 columns at most, one row for each run; of several ranks, the worst one."""
    table = Table()
    for column in (
        "ranks",
        "layout",
        "s/step",
        "speed-up",
        "sent/step",
        "memory",
        "max diff",
    ):
        # A long layout goes over several lines, so that the numbers need not.
        is_layout = column == "layout"
        table.add_column(column, justify="left" if is_layout else "right", no_wrap=not is_layout)
    for run in (single, *others):
        table.add_row(
            str(run.ranks),
            layout_name(run.config),
            number(run.seconds_per_step, ".3f"),
            number(single.seconds_per_step / run.seconds_per_step, ".2f", " x"),
            megabytes(run.bytes_per_step),
            megabytes(run.peak_bytes),
            "-" if run is single else f"{run.difference(single):.1e}",
        )
    return table


def layout_name(config: ParallelConfig) -> str:
    """The short form, with spaces at which a narrow column can end its lines."""
    return str(config).replace(",", ", ")


def number(value: float, form: str, unit: str = "") -> str:
    """A number, or a dash where there is none: one step is too few to time."""
    return "-" if math.isnan(value) else f"{value:{form}}{unit}"


def megabytes(count: float) -> str:
    """A number of bytes, in megabytes of 10**6 bytes."""
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"
