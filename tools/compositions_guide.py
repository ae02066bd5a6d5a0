"""Writes the table of compositions into the guide, from what the tests run and what is refused."""

from __future__ import annotations

from itertools import combinations

import click

from compositions import FUSED, LAYOUTS
from members import ROOT
from omni_parallel.v1.parallel_config import STRATEGIES, ParallelConfig
from omni_parallel.v1.problems import NOT_TOGETHER

GUIDE = ROOT / "docs" / "guides" / "compositions.md"
START, END = "<!-- compositions: start -->", "<!-- compositions: end -->"


def table() -> str:
    """The pairs of strategies, and the layouts that prove them, as Markdown."""
    lines = ["| together | | |", "|---|---|---|"]
    for pair in combinations(STRATEGIES, 2):
        first, second = (f"`{'` or `'.join(STRATEGIES[name])}`" for name in pair)
        why = NOT_TOGETHER.get(pair) or NOT_TOGETHER.get((pair[1], pair[0]))
        said = f"refused: {why}" if why else f"tested: {proof(pair)}"
        lines.append(f"| {first} | {second} | {said} |")
    lines += ["", "| ranks | layouts that are tested |", "|---|---|"]
    for ranks, layouts in LAYOUTS.items():
        all_of_them = [*layouts, *FUSED[ranks]]
        lines.append(f"| {ranks} | {', '.join(f'`{layout}`' for layout in all_of_them)} |")
    return "\n".join(lines)


def proof(pair: tuple[str, str]) -> str:
    """The smallest tested layouts that have both strategies.

    Raises:
        LookupError: No test runs them together.
    """
    for layouts in (*LAYOUTS.values(), *FUSED.values()):
        for layout in layouts:
            if set(pair) <= set(ParallelConfig.parse(layout).asked()):
                return f"`{layout}`"
    msg = f"no tested layout has both {pair[0]} and {pair[1]}, and they are not refused"
    raise LookupError(msg)


def updated(text: str) -> str:
    """The guide's text with the table of now."""
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{table()}\n{END}{after}"


@click.command()
@click.option("--check", is_flag=True, help="Only say whether the guide is up to date.")
def main(check: bool) -> None:
    """Write the table of compositions into the guide."""
    text = GUIDE.read_text(encoding="utf-8")
    new = updated(text)
    if check and new != text:
        msg = f"{GUIDE.name} is not up to date; run python tools/compositions_guide.py"
        raise click.ClickException(msg)
    if new != text:
        GUIDE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
