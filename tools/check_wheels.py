"""Builds every wheel, looks inside, installs each one alone, imports it, and runs it on two ranks.

``hatch run wheels``; with ``--tests`` each package's tests run too. The umbrella is tried beside
every strategy, beside some, and beside none. ``--write`` brings the table in docs/packages.md up to
date, ``--check`` fails where it is not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
from packaging.requirements import Requirement

import packages_guide
from import_times import import_time, too_slow
from installed import closure
from members import ROOT, Package, Packages, dependencies, read_packages, read_toml
from packages_guide import Measured
from umbrella_subsets import SCRIPTS, STRATEGIES, SUBSETS, try_subset
from wheels import (
    Environment,
    build,
    declared,
    environment,
    missing_from,
    run,
    third_party,
    wheel_of,
)

# What every package's tests may use, beside what the package itself declares.
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "numpy", "psutil", "cloudpickle")

# Imports the package and every module in it, then compares which of our packages are there.
PROBE = """
import importlib, importlib.util, pkgutil, sys
name, ours, expected = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
package = importlib.import_module(name)
for module in pkgutil.walk_packages(package.__path__, name + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
there = sorted(other for other in ours if importlib.util.find_spec(other))
sys.exit(0 if there == expected else f"installed with {name}: {there}; expected {expected}")
"""


def trial(package: Package, packages: Packages, wheels: Path, *, tests: bool) -> Measured:
    """Install one wheel into a fresh environment, import it, run it, perhaps run its tests."""
    members = sorted({package.name, *dependencies(packages, package.name)})
    own = [wheel_of(packages[name], wheels) for name in members]
    with environment(own, packages) as made:
        made.install(wheels, package.name)
        ours = ",".join(other.import_name for other in packages.values())
        expected = ",".join(packages[name].import_name for name in members)
        made.execute("-c", PROBE, package.import_name, ours, expected)
        if package.name in STRATEGIES:
            made.execute_on_ranks(SCRIPTS / "run_strategy.py", package.import_name)
        seconds = timed(made, package)
        if tests:
            _run_tests(made, package, own, packages)
    wheel = wheel_of(package, wheels)
    project = read_toml(package.folder / "pyproject.toml")["project"]
    return Measured(
        name=package.name,
        size=wheel.stat().st_size,
        needs=tuple(Requirement(text).name for text in declared(wheel)),
        extras=tuple(project.get("optional-dependencies", {})),
        seconds=seconds,
    )


def timed(made: Environment, package: Package) -> float:
    """Seconds that importing a package takes beyond torch.

    Raises:
        click.ClickException: More than an import may take, twice.
    """
    # Importing the umbrella brings nothing; its API is what a program waits for.
    name = "omni_parallel.v1" if package.name == "omni-parallel" else package.import_name
    seconds = import_time(made.execute, name)
    if too_slow(name, seconds):  # or the machine was busy: caches are shared
        seconds = min(seconds, import_time(made.execute, name))
    complaint = too_slow(name, seconds)
    if complaint is not None:
        raise click.ClickException(complaint)
    return seconds


def _run_tests(
    made: Environment, package: Package, own: Sequence[Path], packages: Packages
) -> None:
    made.borrow(closure(TEST_TOOLS) - third_party(own, packages), "tools")
    made.look_in(ROOT / "tools" / "rank-harness" / "src")
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "rank_harness.plugin"]
    settings = ["-c", str(ROOT / "pyproject.toml"), str(package.folder / "tests")]
    run([str(made.python), "-m", "pytest", *options, *settings], timeout=7200)


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Say how long something took, when it went well."""
    start = time.perf_counter()
    yield
    click.echo(f"ok  {name:<36}{time.perf_counter() - start:5.1f} s")


def _look_inside(packages: Packages, names: Sequence[str], wheels: Path) -> None:
    for name in names:
        missing = missing_from(wheel_of(packages[name], wheels), packages[name])
        if missing:
            msg = f"the wheel of {name} lacks {', '.join(missing)}"
            raise click.ClickException(msg)


def _compare(measured: Sequence[Measured], *, write: bool) -> None:
    text = packages_guide.GUIDE.read_text(encoding="utf-8")
    page = packages_guide.GUIDE.relative_to(ROOT)
    if write:
        packages_guide.GUIDE.write_text(packages_guide.updated(text, measured), encoding="utf-8")
        click.echo(f"wrote {page}")
        return
    complaints = packages_guide.stale(text, measured)
    if complaints:
        msg = f"{page} is stale: {'; '.join(complaints)}; run `hatch run wheels --write`"
        raise click.ClickException(msg)


@click.command()
@click.argument("names", nargs=-1, metavar="[PACKAGE]...")
@click.option("--tests", is_flag=True, help="Run each package's tests on its wheel too.")
@click.option("--write", is_flag=True, help="Write the table in docs/packages.md.")
@click.option("--check", is_flag=True, help="Fail when the table in docs/packages.md is stale.")
def main(names: Sequence[str], *, tests: bool, write: bool, check: bool) -> None:
    """Build the wheels and try each one (or each PACKAGE) alone."""
    packages = read_packages()
    unknown = sorted(set(names) - set(packages))
    if unknown:
        msg = f"no package {', '.join(unknown)}; there are {', '.join(packages)}"
        raise click.ClickException(msg)
    if names and (write or check):
        msg = "the table has all packages: --write and --check go without names"
        raise click.UsageError(msg)
    chosen = names or tuple(packages)
    with tempfile.TemporaryDirectory() as temporary:
        wheels, measured = Path(temporary), []
        with _step("built"):
            build(packages.values(), wheels)
        _look_inside(packages, chosen, wheels)
        for name in chosen:
            with _step(name):
                measured.append(trial(packages[name], packages, wheels, tests=tests))
        click.echo(packages_guide.table(measured))
        if write or check:
            _compare(measured, write=write)
        for title, present in SUBSETS.items() if "omni-parallel" in chosen else ():
            with _step(f"omni-parallel with {title}"):
                try_subset(present, packages, wheels)


if __name__ == "__main__":
    main()
