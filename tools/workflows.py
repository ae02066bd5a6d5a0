"""Writes .github/workflows: one workflow per package, and one for what crosses packages.

A package's workflow starts when its own folder changes, the folder of a package that it needs,
or something that every test depends on. Those paths are read from the declared dependencies, so
they cannot drift: ``hatch run workflows --check`` fails when a file on disk differs.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

import click

from members import ROOT, Packages, dependencies, read_packages

HEADER = "# Written by tools/workflows.py: change that, then `hatch run workflows`.\n"

# What every package's tests depend on, beside the packages themselves.
SHARED_PATHS = (
    "tools/rank-harness/**",
    "tools/run_tests.py",
    "tools/members.py",
    "pyproject.toml",
    "hatch.toml",
)

JOB = """\
    runs-on: ubuntu-latest
    timeout-minutes: 30
    steps:
      - uses: actions/checkout@v5
      - uses: actions/setup-python@v6
        with:
          python-version: "3.11"
          cache: pip
          cache-dependency-path: "**/pyproject.toml"
      - run: pip install 'hatch>=1.18,<2'
"""

# `breaks` compares with a tag, and a checkout without history has none.
CHECKOUT = "      - uses: actions/checkout@v5\n"
WITH_TAGS = f"{CHECKOUT}        with:\n          fetch-depth: 0\n"

HEAD = """\
name: $name

on:
  push:
    branches: [main]$push_paths
  pull_request:$request_paths

permissions:
  contents: read

concurrency:
  group: $${{ github.workflow }}-$${{ github.ref }}
  cancel-in-progress: true

jobs:
"""

# Everything that looks at more than one package. It has no path filter, so it may be a required
# check: a workflow that its paths keep from starting never reports.
CROSS_PACKAGE_JOBS = {
    "checks": (
        "lint",
        "types",
        "versions",
        "workflows --check",
        "api --check",
        "breaks",
        "docs",
    ),
    "tests": ("test tests tools",),
    "coverage": ("coverage",),
    "wheels": ("wheels --check",),
}


def render_package(packages: Packages, name: str) -> str:
    """Return the workflow of one package."""
    members = [name, *sorted(dependencies(packages, name))]
    paths = [f"packages/{member}/**" for member in members]
    paths += [*SHARED_PATHS, f".github/workflows/{name}.yml"]
    lines = "\n    paths:\n" + "\n".join(f'      - "{path}"' for path in paths)
    head = Template(HEAD).substitute(name=name, push_paths=lines, request_paths=lines)
    return f"{HEADER}{head}  test:\n{JOB}      - run: hatch run test {name}\n"


def render_cross_package() -> str:
    """Return the workflow of everything that looks at more than one package."""
    head = Template(HEAD).substitute(name="cross-package", push_paths="", request_paths="")
    jobs = "\n".join(
        f"  {job}:\n{_steps(scripts)}"
        + "".join(f"      - run: hatch run {script}\n" for script in scripts)
        for job, scripts in CROSS_PACKAGE_JOBS.items()
    )
    return f"{HEADER}{head}{jobs}"


def _steps(scripts: tuple[str, ...]) -> str:
    return JOB.replace(CHECKOUT, WITH_TAGS) if "breaks" in scripts else JOB


def render(packages: Packages) -> dict[str, str]:
    """Return the text of every workflow by the name of its file."""
    files = {f"{name}.yml": render_package(packages, name) for name in packages}
    return {**files, "cross-package.yml": render_cross_package()}


def stale(folder: Path, files: dict[str, str]) -> list[str]:
    """Name the files in ``folder`` that are missing, differ from ``files``, or are left over."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.yml")}
    written = {name for name, text in there.items() if text.startswith(HEADER)}
    differ = {name for name, text in files.items() if there.get(name) != text}
    return sorted(differ | (written - set(files)))


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail when a file is stale.")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, hidden=True)
def main(root: Path, *, check: bool) -> None:
    """Write the workflows, or check that those on disk are what would be written."""
    folder = root / ".github" / "workflows"
    files = render(read_packages(root))
    names = stale(folder, files)
    if check and names:
        msg = f"stale in .github/workflows: {', '.join(names)}; run `hatch run workflows`"
        raise click.ClickException(msg)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in files:
            (folder / name).write_text(files[name], encoding="utf-8")
        else:
            (folder / name).unlink()
        click.echo(f"wrote .github/workflows/{name}" if name in files else f"removed {name}")
    if not names:
        click.echo(f"{len(files)} workflows are up to date")


if __name__ == "__main__":
    main()
