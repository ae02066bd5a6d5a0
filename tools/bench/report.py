"""Results as tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from bench.arithmetic import spread
from bench.results import CaseResult, HostResult, Measured, Report

WIDTH: Final = 100
DASH: Final = "-"
CANNOT: Final = "cannot"
_NOTE: Final = 240
UNDISTURBED: Final = 0.95
"""Share of a core from which on other work on the machine counts as none."""

Tables = Callable[[CaseResult], Iterable[RenderableType]]
"""Makes the tables of a case, and what follows them."""


def case_parts(case: CaseResult) -> Iterator[RenderableType]:
    """The table of a case, and what there is to say of it."""
    yield case_table(case)
    yield from disturbance(case)
    yield from notes([(m.name, m.problem) for m in case.measured])
    yield from notes([(m.name, _off_formula(m, case.counted)) for m in case.measured])
    yield from notes([(m.name, _once(m)) for m in case.measured])


def show(report: Report, console: Console, tables: Tables = case_parts) -> None:
    """Print all tables of a report; those of each case are made by ``tables``."""
    for part in parts(report, tables):
        console.print(part)


def parts(report: Report, tables: Tables = case_parts) -> Iterator[RenderableType]:
    """What `show` prints, in order."""
    for case in report.cases:
        yield from tables(case)
    for host in report.host:
        yield host_table(host)
        yield from notes([(cost.name, cost.problem) for cost in host.costs])
        if host.alone_microseconds is not None and host.alone_share is not None:
            yield Text(
                f"  hooks at world size 1 add {host.alone_microseconds:.0f} µs to a forward, "
                f"{host.alone_share:.2%} of one of 320 tokens"
            )
    for name, message in report.failures.items():
        yield Text(f"{name} failed: {message}", style="red")


def disturbance(case: CaseResult) -> Iterator[RenderableType]:
    """Says so if other work on the machine took time from the ranks."""
    if case.core_share < UNDISTURBED:
        yield Text(
            f"  disturbed: other work left each rank {case.core_share:.0%} of its core",
            style="red",
        )


def titled_table(title: str, first: str, *others: str) -> Table:
    """A table of numbers, as wide as all are; the first column has names."""
    table = Table(title=title, title_justify="left", width=WIDTH)
    table.add_column(first, no_wrap=True, ratio=1)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def race_title(case: CaseResult) -> str:
    """What ran how often, and what the machine allows."""
    return (
        f"{case.case} on {case.ranks} ranks, {len(case.single)} rounds; this machine allows "
        f"{case.ceiling:.2f} ×"
    )


def case_table(case: CaseResult) -> Table:
    """One case: times, ratios, error and traffic of each contestant."""
    alone, together = spread(case.single).median, spread(case.together).median
    per, rival = f"/{case.timed}" if case.timed else "", f"/{case.rival}"
    numbers = (f"ms{per}", "speed-up", "quartiles", rival, "error", f"MB/{case.counted}", "calls")
    table = titled_table(race_title(case), "contestant", *numbers)
    table.add_row(case.baseline, f"{alone * 1e3:.0f}", "1.00", "", "", "", "", "")
    table.add_row("the same on all", f"{together * 1e3:.0f}", f"{alone / together:.2f}")
    best = case.best_rival()
    for measured in case.measured:
        table.add_row(*_cells(case, measured), style="bold" if measured is best else None)
    return table


def time_cells(case: CaseResult, measured: Measured) -> list[str] | None:
    """Name, time, speed-up and its quartiles; ``None`` of one that could not run."""
    speed_up = case.speed_up(measured)
    if speed_up is None:
        return None
    return [
        measured.name,
        f"{spread(measured.seconds).median * 1e3:.0f}",
        f"{speed_up.median:.2f}",
        f"{speed_up.low:.2f}–{speed_up.high:.2f}",
    ]


def _cells(case: CaseResult, measured: Measured) -> list[str]:
    times, against = time_cells(case, measured), case.against_rival(measured)
    if times is None:
        return [measured.name, CANNOT]
    return [
        *times,
        DASH if against is None else f"{against.median:.2f}",
        DASH if measured.error is None else f"{measured.error:.0e}",
        _traffic(measured),
        DASH if measured.traffic is None else str(sum(measured.traffic.calls.values())),
    ]


def _traffic(measured: Measured) -> str:
    traffic = measured.traffic
    if traffic is None:
        return DASH
    sent = f"{traffic.bytes_sent / 1e6:.3f}"
    if traffic.bytes_sent == traffic.formula:
        return f"{sent} ="
    return f"{sent} ≠"


def host_table(host: HostResult) -> Table:
    """What the host adds to each layer."""
    title = (
        f"host time, {host.model}, {host.ranks} ranks; single process: "
        f"{host.layer_microseconds:.0f} µs, {host.layer_kernels:.0f} kernels per layer"
    )
    table = titled_table(title, "added per layer by", "µs", "µs on meta", "kernels")
    table.add_column("communication", overflow="fold", ratio=1)
    for cost in host.costs:
        calls = cost.collectives or {}
        table.add_row(
            cost.name,
            _number(cost.microseconds, ".0f"),
            _number(cost.meta_microseconds, ".0f"),
            _number(cost.kernels, ".1f"),
            ", ".join(f"{count} {name}" for name, count in sorted(calls.items())) or DASH,
        )
    return table


def _number(value: float | None, form: str) -> str:
    return DASH if value is None else f"{value:{form}}"


def _off_formula(measured: Measured, counted: str) -> str | None:
    traffic = measured.traffic
    if traffic is None or traffic.bytes_sent == traffic.formula:
        return None
    return (
        f"{traffic.bytes_sent:,} bytes per {counted} of the busiest rank; the formula, for even "
        f"shares, gives {traffic.formula:,.0f}"
    )


def _once(measured: Measured) -> str | None:
    traffic = measured.traffic
    if traffic is None or not traffic.once:
        return None
    calls = ", ".join(f"{count} {name}" for name, count in sorted(traffic.once.items()))
    return f"once in each call, beside that: {calls}; {traffic.once_bytes:,} bytes"


def notes(said: Iterable[tuple[str, str | None]]) -> Iterator[RenderableType]:
    """What there is to say of whom, each thing once."""
    names: dict[str, list[str]] = {}
    for name, text in said:
        if text:
            names.setdefault(text, []).append(name)
    for text, whom in names.items():
        short = text if len(text) <= _NOTE else text[: _NOTE - 1] + "…"
        yield Text(f"  {', '.join(whom)}: {short}", style="yellow")
