"""Finds what breaks code that was written for the last release.

A package's last release is the newest tag ``<package>-vX.Y.Z``, or ``vX.Y.Z`` for all packages at
once. A break is an error while the package is on the line of that release; on a later line it is
listed. Of ``omni_parallel.v1``, which is frozen, every break is an error.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click
import griffe
from packaging.version import InvalidVersion, Version

from members import ROOT, Package, read_packages

FROZEN = "omni_parallel.v1"


class Tag(NamedTuple):
    """A release."""

    version: Version
    name: str


def last_release(package: str, tags: Iterable[str]) -> Tag | None:
    """The newest release of a package among the repository's tags; None if there is none."""
    pattern = re.compile(rf"(?:{re.escape(package)}-)?v(\d.*)")
    found = []
    for name in tags:
        match = pattern.fullmatch(name)
        try:
            version = Version(match[1]) if match else None
        except InvalidVersion:
            continue
        if version is not None and not version.is_prerelease:
            found.append(Tag(version, name))
    return max(found, default=None)


def same_line(one: Version, other: Version) -> bool:
    """Whether code that was written for one must run with the other."""
    return one.major == other.major and (one.major > 0 or one.minor == other.minor)


def breaks(package: Package, tag: str, root: Path) -> list[griffe.Breakage]:
    """What a package breaks since a tag."""
    source = package.folder.relative_to(root) / "src"
    name = package.import_name
    old = griffe.load_git(
        name,
        ref=tag,
        repo=root,
        search_paths=[source],
        resolve_aliases=True,
        allow_inspection=False,
    )
    new = griffe.load(
        name, search_paths=[root / source], resolve_aliases=True, allow_inspection=False
    )
    return list(griffe.find_breaking_changes(old, new))


def _tags(root: Path) -> list[str]:
    done = subprocess.run(["git", "tag"], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _compare(package: Package, tag: Tag, root: Path) -> int:
    """Print what a package breaks; returns how much of it is an error."""
    same, errors = same_line(Version(package.version), tag.version), 0
    for found in breaks(package, tag.name, root):
        forbidden = same or f"{found.obj.path}.".startswith(f"{FROZEN}.")
        errors += forbidden
        click.echo(f"{'error' if forbidden else 'break'}: {found.explain()}")
    return errors


@click.command()
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, hidden=True)
def main(root: Path) -> None:
    """Compare the public names of every package with those of its last release."""
    tags, errors = _tags(root), 0
    for package in read_packages(root).values():
        tag = last_release(package.name, tags)
        if tag is None:
            click.echo(f"{package.name}: no release yet, so there is nothing to break")
            continue
        click.echo(f"{package.name} {package.version} beside {tag.name}")
        errors += _compare(package, tag, root)
    if errors:
        msg = (
            f"{errors} changes break code that was written for the last release; keep the old way "
            "and mark it with omni_group_coordinator.deprecation.deprecated, see docs/versioning.md"
        )
        raise click.ClickException(msg)


if __name__ == "__main__":
    main()
