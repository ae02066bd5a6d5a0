"""The table of packages in docs/packages.md: what each weighs, needs, and takes to import."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from members import ROOT

GUIDE = ROOT / "docs" / "packages.md"
START, END = "<!-- packages: start -->", "<!-- packages: end -->"

ROW = re.compile(r"^\| `(\S+)` \| (\d+) kB \|(.*)$", re.M)

SIZE_TOLERANCE = 0.1
"""By so much a wheel may differ from what the table says: every change of code changes its size."""


@dataclass(frozen=True)
class Measured:
    """One package, as its wheel and its import are."""

    name: str
    """Of the distribution."""
    size: int
    """Of the wheel, in bytes."""
    needs: tuple[str, ...]
    """Distributions that it declares."""
    extras: tuple[str, ...]
    """Names of its extras."""
    seconds: float
    """Processor time of its import beyond torch's."""


def row(one: Measured) -> str:
    """A line of the table."""
    needs = ", ".join(sorted(one.needs, key=lambda name: (name != "torch", name)))
    extras = ", ".join(f"`{extra}`" for extra in one.extras) or "none"
    size, milliseconds = round(one.size / 1000), round(one.seconds * 1e3)
    return f"| `{one.name}` | {size} kB | {needs} | {extras} | {milliseconds} ms |"


def table(measured: Iterable[Measured]) -> str:
    """The table, as Markdown."""
    head = ["| package | wheel | needs | extras | import |", "|---|--:|---|---|--:|"]
    return "\n".join([*head, *map(row, measured)])


def updated(text: str, measured: Iterable[Measured]) -> str:
    """The page's text with this table."""
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{table(measured)}\n{END}{after}"


def stale(text: str, measured: Iterable[Measured]) -> list[str]:
    """What the page says that is no longer so.

    How long an import takes differs from run to run, so only its limit is kept, and not here.
    """
    here = text.partition(START)[2].partition(END)[0]
    said = {
        match[1]: match for match in re.finditer(r"^\| `(\S+)` \| (\d+) kB \|(.*)$", here, re.M)
    }
    found = []
    for one in measured:
        match = said.pop(one.name, None)
        if match is None:
            found.append(f"{one.name} is not in the table")
            continue
        if abs(int(match[2]) * 1000 - one.size) > max(SIZE_TOLERANCE * one.size, 1000):
            found.append(f"the wheel of {one.name} has {one.size / 1000:.0f} kB, not {match[2]} kB")
        columns = row(one).split("|")[3:5]
        if match[3].split("|")[:2] != columns:
            found.append(f"{one.name} needs {columns[0].strip()}; extras: {columns[1].strip()}")
    return [*found, *(f"{name} is no package" for name in said)]
