"""What is marked to go: is it gone in time, and was it announced in time?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from packaging.version import InvalidVersion, Version

from members import Package

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Deprecation:
    """One use of ``omni_group_coordinator.deprecation.deprecated``."""

    place: str
    """File and line, as an editor takes them."""
    name: str
    """Of the function."""
    since: Version
    removed_in: Version


def deprecations(package: Package) -> Iterator[Deprecation]:
    """Yield what a package marks to go.

    Raises:
        ValueError: A version is not written out, or is none.
    """
    for path in sorted(package.source.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in filter(_is_function, ast.walk(tree)):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and _last_name(decorator.func) == "deprecated":
                    place = f"{path.relative_to(package.folder.parent)}:{decorator.lineno}"
                    versions = [_version(decorator, key, place) for key in ("since", "removed_in")]
                    yield Deprecation(place, node.name, *versions)


def _is_function(node: ast.AST) -> TypeGuard[Function]:
    return isinstance(node, Function)


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _version(call: ast.Call, key: str, place: str) -> Version:
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    try:
        return Version(str(ast.literal_eval(values[key])))
    except (KeyError, ValueError, InvalidVersion) as error:
        msg = f'packages/{place}: write {key} out as a version, such as "0.2"'
        raise ValueError(msg) from error


def earliest_removal(since: Version) -> Version:
    """The first version that may lack what was announced to go in ``since``.

    Before 1.0 a line is the first two numbers, and a whole one comes in between; from 1.0 on a
    removal waits for the next first number.
    """
    return Version(f"{since.major + 1}.0" if since.major else f"0.{since.minor + 2}")


def complaints(package: Package) -> Iterator[str]:
    """Yield what is still there though it should be gone, and what would go too early."""
    for found in deprecations(package):
        what = f"packages/{found.place}: {found.name}"
        if Version(package.version) >= found.removed_in:
            yield f"{what} was to be gone in {found.removed_in}; this is {package.version}"
        if found.removed_in < earliest_removal(found.since):
            yield (
                f"{what} would go in {found.removed_in}; deprecated since {found.since}, it stays "
                f"until {earliest_removal(found.since)}"
            )
