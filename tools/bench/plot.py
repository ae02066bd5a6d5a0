"""Speed-ups as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.results import CaseResult, Report

_WIDTH: Final = 0.8
_PALETTES: Final = {True: "Oranges", False: "Blues"}


def plot(report: Report, path: Path) -> None:
    """Draw each contestant's speed-up in each case, under what the machine allows.

    Raises:
        ValueError: There is no case to draw, or the file's ending is none that can be drawn.
    """
    from matplotlib.figure import Figure

    if not report.cases:
        msg = "there is no finished case to plot"
        raise ValueError(msg)
    names = list(dict.fromkeys(m.name for case in report.cases for m in case.measured))
    figure = Figure(figsize=(max(7.0, 2.2 * len(report.cases)), 4.8), layout="constrained")
    axes = figure.subplots()
    colours = _colours(report.cases, names)
    step = _WIDTH / len(names)
    for place, name in enumerate(names):
        bars = [(x, s) for x, case in enumerate(report.cases) if (s := _speed_up(case, name))]
        offset = (place - (len(names) - 1) / 2) * step
        axes.bar(
            [x + offset for x, _ in bars],
            [median for _, (_, median, _) in bars],
            step * 0.95,
            yerr=[
                [median - low for _, (low, median, _) in bars],
                [high - median for _, (_, median, high) in bars],
            ],
            ecolor="0.3",
            color=colours[name],
            label=name,
        )
    for x, case in enumerate(report.cases):
        label = "what the machine allows" if x == 0 else "_"  # "_" is not in the legend
        axes.hlines(case.ceiling, x - 0.45, x + 0.45, "black", "dashed", label=label)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_xticks(range(len(report.cases)), [_label(case) for case in report.cases], fontsize=8)
    axes.set_ylabel(f"speed-up over {report.cases[0].baseline}")
    axes.set_title(f"{report.benchmark}:\nmedians of pairwise ratios, bars to the quartiles")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


def _speed_up(case: CaseResult, name: str) -> tuple[float, float, float] | None:
    for measured in case.measured:
        if measured.name == name and (speed_up := case.speed_up(measured)) is not None:
            return speed_up.low, speed_up.median, speed_up.high
    return None


def _label(case: CaseResult) -> str:
    return case.case.replace(", ", "\n") + f"\n{case.ranks} ranks"


def _colours(
    cases: list[CaseResult], names: list[str]
) -> dict[str, tuple[float, float, float, float]]:
    """One hue for the rival, another one for all others."""
    from matplotlib import colormaps

    rivals = {m.name for case in cases for m in case.measured if m.side == case.rival}
    colours = {}
    for rival, palette in _PALETTES.items():
        group = [name for name in names if (name in rivals) == rival]
        for place, name in enumerate(group):
            shade = 0.85 - 0.5 * place / max(1, len(group) - 1)
            colours[name] = colormaps[palette](shade)
    return colours
