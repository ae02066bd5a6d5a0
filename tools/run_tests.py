"""Runs pytest, with names of packages in place of the folders of their tests.

``hatch run test`` runs everything, ``hatch run test omni-sp -k ring`` the ring tests of omni-sp.
Whatever follows the names goes to pytest as it is.
"""

from __future__ import annotations

import difflib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from members import ROOT


def folders_of_tests(root: Path = ROOT) -> dict[str, str]:
    """Map what a user may name to the folder that pytest is to run."""
    folders = {
        path.parent.name: f"packages/{path.parent.name}/tests"
        for path in sorted(root.glob("packages/*/pyproject.toml"))
    }
    return {**folders, "tests": "tests", "tools": "tools"}


def pytest_arguments(arguments: Sequence[str], root: Path = ROOT) -> list[str]:
    """Translate the leading names of packages; leave everything from the first option on alone.

    Raises:
        ValueError: A leading argument is neither a package nor an existing path.
    """
    folders = folders_of_tests(root)
    translated: list[str] = []
    for index, argument in enumerate(arguments):
        if argument.startswith("-"):
            return [*translated, *arguments[index:]]
        if argument in folders:
            translated.append(folders[argument])
        elif (root / argument.partition("::")[0]).exists():
            translated.append(argument)
        else:
            raise ValueError(_unknown(argument, folders))
    return translated


def _unknown(argument: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(argument.replace("_", "-"), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"{argument!r} is neither a package nor a path in this repository.{hint} "
        f"Packages: {', '.join(names)}."
    )


def main() -> int:
    """Run pytest in the root of the repository and return its exit code."""
    try:
        arguments = pytest_arguments(sys.argv[1:])
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
