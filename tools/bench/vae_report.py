"""Two tables of each decode: how fast and how right, and what was sent."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bench.arithmetic import spread
from bench.report import CANNOT, DASH, disturbance, notes, race_title, time_cells, titled_table
from bench.results import CaseResult
from bench.vae_results import DecodeMeasured, DecodeResult, DecodeTraffic, Sent


def decode_parts(case: CaseResult) -> Iterator[RenderableType]:
    """The tables of a decode, and what there is to say of it."""
    if not isinstance(case, DecodeResult):
        msg = f"{type(case).__name__} is no result of a decode"
        raise TypeError(msg)
    found = [m for m in case.measured if isinstance(m, DecodeMeasured)]
    yield decode_table(case, found)
    yield from disturbance(case)
    yield from notes([(m.name, m.problem) for m in found])
    if case.remark:
        yield Text(f"  {case.remark}", style="yellow")
    if any(m.wire for m in found):
        yield traffic_table(case, found)
        yield from notes([(m.name, _off_formula(m.sent)) for m in found])


def decode_table(case: DecodeResult, measured: list[DecodeMeasured]) -> Table:
    """Times, ratios, memory and errors."""
    numbers = ("ms", "speed-up", "quartiles", "of floor", "memory", "error", "PSNR")
    table = titled_table(race_title(case), "contestant", *numbers)
    alone, together = spread(case.single).median, spread(case.together).median
    memory = f"{case.memory / 1e6:.0f} MB"
    table.add_row(case.baseline, f"{alone * 1e3:.0f}", "1.00", "", "", memory)
    table.add_row("the same on all", f"{together * 1e3:.0f}", f"{alone / together:.2f}")
    for each in measured:
        table.add_row(*_cells(case, each))
    return table


def _cells(case: DecodeResult, measured: DecodeMeasured) -> list[str]:
    times, share = time_cells(case, measured), case.share_of_floor(measured)
    if times is None:
        return [measured.name, CANNOT]
    known = measured.memory is not None
    return [
        *times,
        DASH if share is None else f"{share.median:.0%}",
        DASH if measured.memory is None else f"{measured.memory / case.memory:.2f} ×",
        _error(measured.error),
        DASH if not known else "∞" if measured.psnr is None else f"{measured.psnr:.0f} dB",
    ]


def _error(error: float | None) -> str:
    if error is None:
        return DASH
    return f"{error:.0e}" if error else "0"


def traffic_table(case: DecodeResult, measured: list[DecodeMeasured]) -> Table:
    """What the busiest rank sends, by purpose: megabytes, and how often."""
    title = f"MB and calls of the busiest rank; {case.reaching} convolutions reach beyond a row"
    table = titled_table(title, "contestant", "halos", "norms", "attention", "result", "all")
    for each in measured:
        if each.wire is not None and each.wire.calls:
            table.add_row(each.name, *_purposes(each.sent), _amount(each.wire))
    return table


def _purposes(sent: DecodeTraffic | None) -> list[str]:
    if sent is None:
        return [DASH] * 4
    sign = " =" if sent.halos.bytes == sent.formula else " ≠"
    halos = _amount(sent.halos)
    return [
        halos if halos == DASH else halos + sign,
        _amount(sent.norms),
        _amount(sent.attention),
        _amount(sent.result),
    ]


def _amount(sent: Sent) -> str:
    if not sent.calls:
        return DASH
    size = sent.bytes / 1e6
    return f"{size:.3f} in {sent.calls}" if size < 1 else f"{size:.3g} in {sent.calls}"


def _off_formula(sent: DecodeTraffic | None) -> str | None:
    if sent is None or sent.halos.bytes == sent.formula:
        return None
    return f"{sent.halos.bytes:,} bytes of halos; the formula gives {sent.formula:,}"
