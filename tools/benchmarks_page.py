"""Writes the page of benchmarks and its pictures, from results that benchmarks wrote as JSON.

    hatch run bench sp --json docs/results/sp.json
    python tools/benchmarks_page.py

Of a benchmark without results the page has the command that makes them. Results of which other
work on the machine took time are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from bench.arithmetic import Spread, spread
from bench.plot import plot
from bench.report import UNDISTURBED
from bench.results import CaseResult, Measured, Report
from members import ROOT

DOCS = ROOT / "docs"
BENCHMARKS = {
    "e2e": "Whole pipelines",
    "sp": "Sequence parallelism",
    "cfg": "Guidance over ranks",
    "pp": "Pipeline stages",
    "vae": "Autoencoders over ranks",
    "hsdp": "Sharded weights",
}
"""What `hatch run bench` calls them, and their titles, in the order of the page."""

START, END = "<!-- results: start -->", "<!-- results: end -->"
Results = Mapping[str, Any]


def page(docs: Path) -> str:
    """All results as Markdown."""
    return "\n".join(line for name in BENCHMARKS for line in section(docs, name))


def section(docs: Path, name: str) -> Iterator[str]:
    """One benchmark: its machine, its picture and its tables."""
    yield from (f"## {BENCHMARKS[name]}", "")
    command = f"hatch run bench {name} --json docs/results/{name}.json"
    results = read_results(docs, name)
    if results is None:
        yield from (f"Not measured yet on a quiet machine; `{command}` does it.", "")
        return
    machine = results["machine"]
    yield from (
        f"`{command}`, on {machine['cores']} cores ({machine['processor']}), torch "
        f"{machine['torch']}, diffusers {machine['diffusers']}, Python {machine['python']}.",
        "",
        f"![Speed-ups: {BENCHMARKS[name]}](images/benchmark-{name}.png)",
        "",
    )
    for case in results["cases"]:
        yield from table(case)
    for failed, why in results["failures"].items():
        yield from (f"Not measured: {failed}: {why.splitlines()[0]}", "")


def read_results(docs: Path, name: str) -> Results | None:
    """Results of one benchmark, or None if there are none.

    Raises:
        ValueError: The machine had other work to do.
    """
    file = docs / "results" / f"{name}.json"
    if not file.is_file():
        return None
    results: Results = json.loads(file.read_text(encoding="utf-8"))
    for case in results["cases"]:
        if case["core_share"] < UNDISTURBED:
            msg = (
                f"{file.name}: other work left the ranks {case['core_share']:.0%} of their cores "
                f"in {case['case']!r}; measure again on a quiet machine, at least {UNDISTURBED:.0%}"
            )
            raise ValueError(msg)
    return results


def table(case: Results) -> Iterator[str]:
    """One case: each contestant beside one process."""
    rounds = len(case["single"])
    yield from (
        f"**{case['case']}**, {case['ranks']} ranks, {rounds} rounds. This machine allows "
        f"{case['ceiling']:.2f} ×.",
        "",
        f"| contestant | of | ms | speed-up | quartiles | over {case['rival']} | error |",
        "|---|---|---|---|---|---|---|",
        f"| {case['baseline']} | | {spread(case['single']).median * 1e3:.0f} | 1.00 × | | | |",
    )
    for one in case["measured"]:
        yield "| " + " | ".join(cells(one)) + " |"
    yield ""


def cells(one: Results) -> list[str]:
    """A contestant's row; what it could not run is said in its place."""
    if not one["seconds"]:
        why = (one["problem"] or "could not run").splitlines()[0].replace("|", "/")
        return [one["name"], one["side"], "", f"could not run: {why}", "", "", ""]
    speed, rival, error = one["speed_up"], one["against_rival"], one["error"]
    return [
        one["name"],
        one["side"],
        f"{spread(one['seconds']).median * 1e3:.0f}",
        "" if speed is None else f"{speed['median']:.2f} ×",
        "" if speed is None else f"{speed['low']:.2f}–{speed['high']:.2f}",
        "" if rival is None else f"{rival['median']:.2f} ×",
        "" if error is None else f"{error:.0e}",
    ]


def draw(docs: Path, name: str) -> None:
    """Draw the speed-ups of one benchmark."""
    results = read_results(docs, name)
    if results is None or not results["cases"]:
        return
    cases: list[CaseResult] = [drawn(case) for case in results["cases"]]
    (docs / "images").mkdir(exist_ok=True)
    plot(Report(results["benchmark"], cases), docs / "images" / f"benchmark-{name}.png")


@dataclass(frozen=True)
class DrawnCase(CaseResult):
    """A case whose speed-ups are those of the file: what one process does is each benchmark's own.

    Attributes:
        speed_ups: By name of the contestant.
    """

    speed_ups: Mapping[str, Spread] = field(default_factory=dict)

    def speed_up(self, measured: Measured) -> Spread | None:
        """As in the tables."""
        return self.speed_ups.get(measured.name)


def drawn(case: Results) -> DrawnCase:
    """What a picture needs of a case."""
    measured = tuple(
        Measured(one["name"], one["side"], tuple(one["seconds"])) for one in case["measured"]
    )
    speeds = {one["name"]: Spread(**one["speed_up"]) for one in case["measured"] if one["speed_up"]}
    times = (tuple(case["single"]), tuple(case["together"]))
    return DrawnCase(
        case["case"],
        case["ranks"],
        case["rival"],
        *times,
        measured,
        baseline=case["baseline"],
        speed_ups=speeds,
    )


def updated(docs: Path, text: str) -> str:
    """The page's text with the results of now."""
    before, rest = text.split(START)
    return f"{before}{START}\n{page(docs)}{END}{rest.split(END)[1]}"


@click.command()
@click.option("--check", is_flag=True, help="Only say whether the page is up to date.")
def main(check: bool) -> None:
    """Write docs/benchmarks.md and its pictures from docs/results."""
    file = DOCS / "benchmarks.md"
    text = file.read_text(encoding="utf-8")
    try:
        new = updated(DOCS, text)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if check:
        if new != text:
            msg = f"{file.name} is not up to date; run python tools/benchmarks_page.py"
            raise click.ClickException(msg)
        return
    for name in BENCHMARKS:
        draw(DOCS, name)
    file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
