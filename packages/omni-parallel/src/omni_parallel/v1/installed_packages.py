"""Which packages are installed, and whether they go together."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    distribution,
    entry_points,
)

from omni_group_coordinator import ParallelConfigError
from omni_parallel.__about__ import __version__

API = 1
"""The version of the API between the umbrella and the strategies."""

_GROUP = re.compile(r"omni_parallel\.v(\d+)\.strategies")
PACKAGES = {
    "sp": "omni-sp",
    "cfgp": "omni-cfgp",
    "pp": "omni-pp",
    "pipefusion": "omni-pp",
    "hsdp": "omni-hsdp",
    "vae_patch": "omni-vae-patch",
}
"""What to install for the strategies of this project; others name themselves."""

_CORE = ("omni-parallel", "omni-group-coordinator", "omni-parallel-state")


@dataclass(frozen=True)
class PackageVersion:
    """One package of this project, or one that brings a strategy."""

    name: str
    """Of the distribution."""
    version: str | None
    """None: not installed."""
    strategies: tuple[str, ...] = ()
    """Strategies that it brings."""
    api: tuple[int, ...] = ()
    """Versions of the API that they speak."""
    problem: str = ""
    """Why it does not go together with this umbrella; empty if it does."""


def versions() -> tuple[PackageVersion, ...]:
    """The packages of this project and those that bring strategies, with their versions."""
    brought: dict[str, list[tuple[int, str]]] = {}
    for api, entry in _entries():
        if entry.dist is not None:
            brought.setdefault(entry.dist.name, []).append((api, entry.name))
    names = [*_CORE, *dict.fromkeys(PACKAGES.values())]
    names += sorted(set(brought) - set(names))
    return tuple(_described(name, brought.get(name, [])) for name in names)


def _described(name: str, brought: list[tuple[int, str]]) -> PackageVersion:
    version = installed_version(name)
    strategies = tuple(sorted({strategy for _, strategy in brought}))
    api = tuple(sorted({number for number, _ in brought}))
    problem = "" if version is None else _problem(name, version, api)
    return PackageVersion(name, version, strategies, api, problem)


def installed_version(name: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def line_of(version: str) -> str:
    """What packages that go together have in common: the first two numbers."""
    return ".".join(version.split(".")[:2])


def _problem(name: str, version: str, api: tuple[int, ...]) -> str:
    if api and API not in api:
        spoken = ", ".join(f"v{number}" for number in api)
        return (
            f"{name} {version} speaks {spoken} of the API, omni-parallel {__version__} speaks "
            f"v{API}; try: pip install --upgrade omni-parallel {name}"
        )
    ours = name in _CORE or name in PACKAGES.values()
    if ours and line_of(version) != line_of(__version__):
        line = line_of(__version__)
        return (
            f"{name} {version} does not go with omni-parallel {__version__}; legal: {line}.*; "
            f"try: pip install --upgrade 'omni-parallel=={line}.*' '{name}=={line}.*'"
        )
    return ""


def unknown_api(strategy: str) -> str | None:
    """Why a strategy that is installed is not used: its API is of another version."""
    for api, entry in _entries():
        if entry.name == strategy and api != API and entry.dist is not None:
            return _problem(entry.dist.name, entry.dist.version, (api,))
    return None


def check_package(strategy: str, package: Distribution | None) -> None:
    """Refuse the package of a strategy that does not go together with this one.

    Raises:
        ParallelConfigError: Its version is of another line; says what to install.
    """
    if package is None:  # not from an installed distribution, so there is no version to compare
        return
    problem = _problem(package.name, package.version, (API,))
    if problem:
        msg = f"strategy {strategy!r}: {problem}"
        raise ParallelConfigError(msg)


def _entries() -> list[tuple[int, EntryPoint]]:
    found = entry_points()
    return [
        (int(match[1]), entry)
        for group in sorted(found.groups)
        if (match := _GROUP.fullmatch(group))
        for entry in found.select(group=group)
    ]
