"""What the packages of this repository say about themselves in their pyproject.toml files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

Packages = Mapping[str, "Package"]
"""Packages by the name of their distribution, in the order of their names."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One distribution of this repository."""

    folder: Path
    """Its folder, packages/<name of the distribution>."""
    name: str
    """Name of the distribution, as its metadata has it."""
    version: str
    """Version, read from the file that its build reads it from."""
    python: str
    """The range of Python versions."""
    requirements: tuple[Requirement, ...]
    """What it needs, extras included."""

    @property
    def import_name(self) -> str:
        """Name by which Python code imports it."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """Folder of its modules."""
        return self.folder / "src" / self.import_name


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_package(folder: Path) -> Package:
    """Read the metadata of the package in ``folder``."""
    pyproject = read_toml(folder / "pyproject.toml")
    project = pyproject["project"]
    about = folder / pyproject["tool"]["hatch"]["version"]["path"]
    version = re.search(r'^__version__ = "([^"]+)"$', about.read_text(encoding="utf-8"), re.M)
    if version is None:
        msg = f'{about} has no line of the form __version__ = "X.Y.Z"'
        raise ValueError(msg)
    optional = project.get("optional-dependencies", {})
    texts = [*project["dependencies"], *(text for extra in optional.values() for text in extra)]
    return Package(
        folder=folder,
        name=project["name"],
        version=version[1],
        python=project["requires-python"],
        requirements=tuple(map(Requirement, texts)),
    )


def read_packages(root: Path = ROOT) -> Packages:
    """Read every package of the repository at ``root``."""
    files = sorted(root.glob("packages/omni-*/pyproject.toml"))
    return {package.name: package for package in (read_package(file.parent) for file in files)}


def dependencies(packages: Packages, name: str) -> set[str]:
    """Return the packages of this repository that ``name`` needs, directly or not."""
    direct = {needed.name for needed in packages[name].requirements if needed.name in packages}
    direct.discard(name)  # an extra may be made of the package's other extras
    return direct.union(*(dependencies(packages, needed) for needed in direct))


def dependents(packages: Packages, name: str) -> set[str]:
    """Return the packages of this repository that need ``name``, directly or not."""
    return {other for other in packages if name in dependencies(packages, other)}


def affected(packages: Packages, changed: Iterable[str]) -> list[str]:
    """Return the packages whose tests may end differently after a change.

    Args:
        packages: The packages of this repository.
        changed: Paths of the changed files, relative to the root and with forward slashes.

    Returns:
        Names of the touched packages and of their dependents. Whatever belongs to no package
        (root configuration, the test harness) touches all of them; documentation touches none.
    """
    touched: set[str] = set()
    for path in changed:
        top, _, rest = path.partition("/")
        name = rest.partition("/")[0]
        if top == "packages" and name in packages:
            touched |= {name, *dependents(packages, name)}
        elif top != "docs" and not (path.endswith(".md") and not rest):
            touched |= set(packages)
    return sorted(touched)
