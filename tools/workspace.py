"""Checks that the packages go together, and tells which of them a change affects.

``hatch run versions`` compares every package's metadata with the table ``[tool.omni-parallel]``
of the root pyproject.toml, and finds what is deprecated and should be gone;
``hatch run affected --base main`` lists packages to test.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from packaging.requirements import Requirement

from deprecations import complaints
from members import ROOT, Package, Packages, affected, read_packages, read_toml


@dataclass(frozen=True, kw_only=True)
class Release:
    """The versions that go together."""

    line: str
    """First two numbers of the version of every package."""
    torch: str
    """The oldest torch that the suite was run on."""
    python: str
    """The oldest Python that the suite was run on."""
    pinned_torch: str
    """The torch of the development environment."""

    @property
    def range(self) -> str:
        """How one package asks for another: 0.1 admits only 0.1.*, 1.4 admits 1.4 up to 2."""
        major, minor = map(int, self.line.split("."))
        return f">={self.line},<{major + 1}" if major else f">={self.line},<0.{minor + 1}"


def read_release(root: Path) -> Release:
    """Read the versions that go together from the root pyproject.toml."""
    pyproject = read_toml(root / "pyproject.toml")
    development = map(Requirement, pyproject["dependency-groups"]["dev"])
    pinned = next(str(needed.specifier) for needed in development if needed.name == "torch")
    table = pyproject["tool"]["omni-parallel"]
    return Release(**table, pinned_torch=pinned.removeprefix("=="))


def disagreements(packages: Packages, release: Release) -> Iterator[str]:
    """Yield each place that disagrees with the versions that go together."""
    pinned = release.pinned_torch
    if pinned != release.torch and not pinned.startswith(f"{release.torch}."):
        yield (
            f"pyproject.toml: the suite runs on torch {pinned} (dependency group 'dev'), "
            f'but the floor is {release.torch}; write torch = "{pinned.rpartition(".")[0]}"'
        )
    for package in packages.values():
        yield from _disagreements_of(package, packages, release)


def _disagreements_of(package: Package, packages: Packages, release: Release) -> Iterator[str]:
    where = f"packages/{package.folder.name}"
    if package.name != package.folder.name:
        yield f"{where}: the folder holds the distribution {package.name}; rename one of them"
    if not package.version.startswith(f"{release.line}."):
        yield f"{where}: version {package.version} is off the line; expected {release.line}.*"
    if package.python != f">={release.python}":
        yield f"{where}: requires-python is {package.python}; expected >={release.python}"
    for needed in package.requirements:
        expected = _expected_range(needed, package, packages, release)
        if expected is not None and needed.specifier != Requirement(f"x{expected}").specifier:
            found = str(needed.specifier) or "no range"
            yield f"{where}: asks for {needed.name} with {found}; expected {expected}"
    if not any(needed.name == "torch" for needed in package.requirements):
        yield f"{where}: does not ask for torch; expected torch>={release.torch}"
    yield from complaints(package)


def _expected_range(
    needed: Requirement, package: Package, packages: Packages, release: Release
) -> str | None:
    if needed.name == "torch":
        return f">={release.torch}"
    if needed.name in packages and needed.name != package.name:
        return release.range
    return None


def write_ranges(packages: Packages, release: Release) -> list[Path]:
    """Bring the ranges between packages and the floors on the line.

    Versions stay: whether a package goes to X.Y.0 is a person's decision.

    Returns:
        The files that changed.
    """
    changed: list[Path] = []
    for package in packages.values():
        path = package.folder / "pyproject.toml"
        before = path.read_text(encoding="utf-8")
        after = _with_ranges(before, package, packages, release)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def _with_ranges(text: str, package: Package, packages: Packages, release: Release) -> str:
    others = "|".join(re.escape(name) for name in packages if name != package.name)
    asks = r'"({})(\[[^\]]*\])?[<>=!~ ][^";]*'
    text = re.sub(asks.format(others), rf'"\g<1>\g<2>{release.range}', text)
    text = re.sub(r'"torch[<>=!~ ][^";]*', f'"torch>={release.torch}', text)
    return re.sub(
        r'^requires-python = "[^"]*"', f'requires-python = ">={release.python}"', text, flags=re.M
    )


def changed_files(root: Path, base: str) -> list[str]:
    """List the files that differ between the working tree and where it left ``base``."""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard")
    try:
        return [*_git(root, "diff", "--name-only", "--merge-base", base), *untracked]
    except subprocess.CalledProcessError as error:
        msg = f"cannot compare with {base!r}: {error.stderr.strip()}"
        raise click.ClickException(msg) from error


def _git(root: Path, *arguments: str) -> list[str]:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@click.group()
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, hidden=True)
@click.pass_context
def main(context: click.Context, root: Path) -> None:
    """Look at the packages of this repository as a whole."""
    context.obj = root


@main.command()
@click.option("--write", is_flag=True, help="Rewrite the ranges and floors; versions stay.")
@click.pass_obj
def versions(root: Path, *, write: bool) -> None:
    """Check that versions, ranges and floors agree with the line in the root pyproject.toml."""
    release = read_release(root)
    if write:
        for path in write_ranges(read_packages(root), release):
            click.echo(f"wrote {path.relative_to(root)}")
    packages = read_packages(root)
    found = list(disagreements(packages, release))
    for text in found:
        click.echo(text)
    if found:
        msg = (
            f"{len(found)} disagreements with line {release.line}; `hatch run versions --write` "
            "rewrites ranges and floors, `hatch version X.Y.Z` in a package's folder its version"
        )
        raise click.ClickException(msg)
    click.echo(
        f"{len(packages)} packages agree: line {release.line}, torch>={release.torch}, "
        f"Python>={release.python}"
    )


@main.command("affected")
@click.option("--base", required=True, help="Commit or branch to compare with.")
@click.pass_obj
def affected_command(root: Path, base: str) -> None:
    """Print, as a JSON list, the packages touched since BASE and their dependents."""
    packages = read_packages(root)
    click.echo(json.dumps(affected(packages, changed_files(root, base))))


if __name__ == "__main__":
    main()
