"""What the page on troubleshooting quotes is what the packages say."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import omni_group_coordinator

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [
    line
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
HOLE = "…"


def texts(node: ast.AST) -> Iterator[str]:
    """Strings of some code as they are printed, with a hole for each value; no docstrings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        found = rendered(child) if isinstance(child, ast.expr) else None
        if found is not None:
            yield found
        yield from texts(child)


def rendered(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = rendered(node.left), rendered(node.right)
        return None if parts == (None, None) else "".join(part or HOLE for part in parts)
    return None


@cache
def said_by() -> dict[str, tuple[str, ...]]:
    """What the sources of each package say."""
    return {
        package.name: tuple(
            text
            for file in sorted(package.glob("src/**/*.py"))
            for text in texts(ast.parse(file.read_text(encoding="utf-8")))
        )
        for package in sorted((ROOT / "packages").glob("omni-*"))
    }


def packages_that_say(line: str) -> list[str]:
    """Packages with a text that has the parts of a line between its holes, in their order."""
    parts = [re.escape(part) for part in line.split(HOLE)]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return [name for name, said in said_by().items() if any(map(pattern.search, said))]


@pytest.mark.parametrize("line", QUOTED)
def test_a_quoted_message_stands_in_the_sources(line: str) -> None:
    words = re.findall(r"\w{2,}", line.replace(HOLE, " "))
    assert len(words) >= 2, "so short a quotation could be anything"
    assert packages_that_say(line)


def test_a_message_that_nobody_says_is_found_out() -> None:
    assert not packages_that_say("rank … was the last to fail…")
    assert not packages_that_say("… legal: … cannot run on … rank")


def test_every_package_and_every_class_of_errors_has_its_place() -> None:
    assert {name for line in QUOTED for name in packages_that_say(line)} == set(said_by())
    errors = [name for name in omni_group_coordinator.__all__ if name.endswith("Error")]
    assert errors
    assert all(f"| `{name}` |" in PAGE for name in errors)


def test_no_message_is_quoted_twice() -> None:
    assert len(QUOTED) == len(set(QUOTED))
