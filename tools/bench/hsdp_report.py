"""Memory and time of each policy as a table, for the terminal and for the docs, and the bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.arithmetic import spread
from bench.hsdp_results import Peaks, ShardedMeasured, ShardedResult
from bench.report import CANNOT, DASH, disturbance, notes, race_title, titled_table
from bench.results import CaseResult

NOTE: Final = (
    "MB are peaks of the rank that had most, in a fresh process, beyond what it held after "
    "imports; in brackets without the pages of mapped files. Weights of a rank are among them. "
    "glibc returns what is freed."
)
_MARKDOWN: Final = (
    "| | ranks | MB while loading | MB while running | ms per forward | × whole model |",
    "|---|--:|--:|--:|--:|--:|",
)


def sharded_parts(case: CaseResult) -> Iterator[RenderableType]:
    """The table of a case, its bars, and what there is to say of it."""
    found = as_sharded(case)
    yield sharded_table(found)
    sizes = f"weights of {_megabytes(found.model)}, blocks of up to {_megabytes(found.block)}"
    yield Text(f"  {sizes}")
    yield from disturbance(found)
    yield from notes([(m.name, m.problem) for m in found.measured])
    for bar in found.bars():
        sign, style = ("met", "green") if bar.met else ("NOT MET", "red")
        yield Text(f"  {sign}: {bar.what}: {bar.found}", style=style)
    yield Text(f"  {NOTE}", style="dim")


def as_sharded(case: CaseResult) -> ShardedResult:
    """The case as one of this benchmark.

    Raises:
        TypeError: It is of another one.
    """
    if not isinstance(case, ShardedResult):
        msg = f"{type(case).__name__} is no result of sharded weights"
        raise TypeError(msg)
    return case


def sharded_table(case: ShardedResult) -> Table:
    """Peaks, times, ratios and errors."""
    title = race_title(case).replace(" 1 ranks", " 1 rank")
    numbers = ("MB loading", "MB running", "ms", "× whole", f"/{case.rival}", "error")
    table = titled_table(title, "contestant", *numbers)
    alone, together = spread(case.single).median, spread(case.together).median
    table.add_row(case.baseline, "", "", f"{alone * 1e3:.0f}", f"{alone / together:.2f}")
    table.add_row("the same on all", "", "", f"{together * 1e3:.0f}", "1.00")
    for each in case.measured:
        table.add_row(*_cells(case, each))
    return table


def _cells(case: ShardedResult, measured: object) -> list[str]:
    if not isinstance(measured, ShardedMeasured):
        msg = f"{measured!r} is no contestant of sharded weights"
        raise TypeError(msg)
    memory, against = measured.memory, case.against_rival(measured)
    first = [measured.name]
    first += [DASH] * 2 if memory is None else [_peaks(memory.loading), _peaks(memory.running)]
    ratio = case.against_whole(measured)
    if ratio is None:
        return [*first, CANNOT]
    return [
        *first,
        f"{spread(measured.seconds).median * 1e3:.0f}",
        f"{ratio.median:.2f}",
        DASH if against is None else f"{against.median:.2f}",
        DASH if measured.error is None else f"{measured.error:.1g}",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def _peaks(peaks: Peaks) -> str:
    return f"{peaks.resident / 1e6:.0f} ({peaks.anonymous / 1e6:.0f})"


def markdown(cases: Sequence[CaseResult]) -> str:
    """The table of memory and latency, a part for each model, as the guide has it."""
    lines: list[str] = []
    for title in dict.fromkeys(case.case for case in cases):
        own = [as_sharded(case) for case in cases if case.case == title]
        rounds, size = len(own[0].single), f"{own[0].model / 1e6:.0f} MB"
        lines += [f"{title}, {size} in float32, {rounds} rounds:", "", *_MARKDOWN]
        for case in own:
            lines += [_markdown_row(case, m) for m in case.measured if m.seconds]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(case: ShardedResult, measured: object) -> str:
    name, loading, running, milliseconds, ratio, *_ = _cells(case, measured)
    return f"| {name} | {case.ranks} | {loading} | {running} | {milliseconds} | {ratio} |"


def write_markdown(cases: Sequence[CaseResult], path: Path) -> None:
    """Write `markdown` to a file."""
    path.write_text(markdown(cases), encoding="utf-8")
