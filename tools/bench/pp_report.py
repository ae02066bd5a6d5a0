"""Times, ideals, weights and traffic of stages as a table, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.arithmetic import spread
from bench.pp_contestants import OWN
from bench.pp_results import StagedMeasured, StagedResult
from bench.report import CANNOT, DASH, disturbance, notes, race_title, time_cells, titled_table
from bench.results import CaseResult

NOTE: Final = (
    "ms are those of one image. Each is compared with one process that makes the same: a guided "
    "image, or that of its row of this name. MB of weights are those of the rank that holds most, "
    "MB/step those of the rank that sends most; = is what was promised, or what arithmetic gives."
)


def staged_parts(case: CaseResult) -> Iterator[RenderableType]:
    """The table of a case, its bars, and what there is to say of it.

    Raises:
        TypeError: It is of another benchmark.
    """
    if not isinstance(case, StagedResult):
        msg = f"{type(case).__name__} is no result of stages"
        raise TypeError(msg)
    yield staged_table(case)
    yield from disturbance(case)
    yield from notes([(m.name, m.problem) for m in case.measured])
    yield from notes([(m.name, _off_arithmetic(m)) for m in case.staged()])
    for bar in case.bars():
        sign, style = ("met", "green") if bar.met else ("NOT MET", "red")
        yield Text(f"  {sign}: {bar.what}: {bar.found}", style=style)
    yield Text(f"  {NOTE}", style="dim")


def staged_table(case: StagedResult) -> Table:
    """One row for each contestant."""
    numbers = ("ms", "speed-up", "quartiles", "ideal", "share", "weights", "MB/step", "error")
    table = titled_table(race_title(case), "contestant", *numbers)
    alone, together = spread(case.single).median, spread(case.together).median
    table.add_row(case.baseline, f"{alone * 1e3:.0f}", "1.00", "", "1.00")
    table.add_row("the same on all", f"{together * 1e3:.0f}", f"{alone / together:.2f}")
    for each in case.staged():
        table.add_row(*_cells(case, each))
    return table


def _cells(case: StagedResult, measured: StagedMeasured) -> list[str]:
    times, share = time_cells(case, measured), case.share(measured)
    if times is None or share is None:
        return [measured.name, CANNOT]
    return [
        *times,
        f"{measured.ideal:.2f}",
        f"{share:.0%}",
        _weights(measured),
        _sent(measured),
        DASH if measured.error is None else f"{measured.error:.0e}",
    ]


def _weights(measured: StagedMeasured) -> str:
    if not measured.held:
        return DASH
    most = f"{max(measured.held) / 1e6:.0f}"
    if measured.side != OWN:
        return most
    return f"{most} =" if measured.held == measured.promised else f"{most} ≠"


def _sent(measured: StagedMeasured) -> str:
    if not measured.sent:
        return DASH
    return f"{max(measured.sent) / 1e6:.2f} {'=' if measured.bytes_fit else '≠'}"


def _off_arithmetic(measured: StagedMeasured) -> str | None:
    if measured.bytes_fit:
        return None
    sent = ", ".join(f"{count:,}" for count in measured.sent)
    expected = ", ".join(f"{count:,.0f}" for count in measured.expected)
    return f"{sent} bytes per step by rank; arithmetic gives {expected}"
