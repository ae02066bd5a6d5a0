"""Builds every wheel, looks inside, installs each one alone and imports it.

``hatch run wheels``; with ``--tests`` each package's tests run too. A trial's virtual environment
borrows from this one exactly the third-party packages that the wheel declares, and takes the
packages of this repository from the fresh wheels only. An undeclared dependency, which the shared
development environment hides, fails here.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import HeaderParser
from pathlib import Path

import click
from packaging.requirements import Requirement

from installed import closure, top_level_paths
from members import ROOT, Package, Packages, dependencies, read_packages

# What every package's tests may use, beside what the package itself declares.
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "numpy", "psutil", "cloudpickle")

# Files that a package must not lose on the way into its wheel, beside py.typed and LICENSE.
DATA = {"omni-parallel": ("omni_parallel/demo/model/",)}

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


def build(packages: Iterable[Package], folder: Path) -> None:
    """Build the packages' wheels into ``folder``, each in an isolated environment."""
    sources = [str(package.folder) for package in packages]
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), *sources])


def wheel_of(package: Package, folder: Path) -> Path:
    """Return the package's wheel in ``folder``."""
    return next(folder.glob(f"{package.import_name}-{package.version}-*.whl"))


def missing_from(wheel: Path, package: Package) -> list[str]:
    """Name what the wheel should hold and does not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"{package.import_name}-{package.version}.dist-info"
    wanted = [f"{package.import_name}/py.typed", f"{info}/licenses/LICENSE"]
    wanted += DATA.get(package.name, ())
    return [path for path in wanted if not any(name.startswith(path) for name in names)]


def declared(wheel: Path) -> list[str]:
    """Return the requirements in the wheel's metadata, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(path).decode())
    texts = headers.get_all("Requires-Dist") or []
    return [text for text in texts if "extra ==" not in text]


def lend(names: Iterable[str], folder: Path) -> None:
    """Link installed distributions into ``folder``, and nothing else of this environment."""
    folder.mkdir()
    for name in names:
        for path in top_level_paths(name):
            (folder / path.name).symlink_to(path)


def third_party(wheels: Iterable[Path], packages: Packages) -> set[str]:
    """Return what the wheels declare and this repository does not make, directly or not."""
    texts = [text for wheel in wheels for text in declared(wheel)]
    return closure(text for text in texts if Requirement(text).name not in packages)


def trial(package: Package, packages: Packages, wheels: Path, *, tests: bool) -> None:
    """Install one wheel into a fresh virtual environment, import it, perhaps run its tests."""
    members = sorted({package.name, *dependencies(packages, package.name)})
    own = [wheel_of(packages[name], wheels) for name in members]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lend(third_party(own, packages), folder / "declared")
        lines = [str(folder / "declared")]
        python = _environment(folder / "venv", lines)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
        _run([*pip, "--no-index", "--find-links", str(wheels), package.name])
        ours = ",".join(other.import_name for other in packages.values())
        expected = ",".join(packages[name].import_name for name in members)
        _run([str(python), "-I", "-c", PROBE, package.import_name, ours, expected], folder)
        if tests:
            tools = closure(TEST_TOOLS) - third_party(own, packages)
            lend(tools, folder / "tools")
            lines += [str(folder / "tools"), str(ROOT / "tools" / "rank-harness" / "src")]
            python = _environment(folder / "venv", lines)
            _run_tests(python, package)


def _environment(folder: Path, paths: Sequence[str]) -> Path:
    """Make a virtual environment, if there is none, that also looks for packages in ``paths``."""
    if not folder.exists():
        venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text("\n".join(paths))
    return folder / "bin" / "python"


def _run_tests(python: Path, package: Package) -> None:
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "rank_harness.plugin"]
    folder = package.folder / "tests"
    _run([str(python), "-m", "pytest", *options, "-c", str(ROOT / "pyproject.toml"), str(folder)])


def _run(command: Sequence[str], folder: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        msg = f"{' '.join(command[:6])} ...\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        raise click.ClickException(msg)


@click.command()
@click.argument("names", nargs=-1, metavar="[PACKAGE]...")
@click.option("--tests", is_flag=True, help="Run each package's tests on its wheel too.")
def main(names: Sequence[str], *, tests: bool) -> None:
    """Build the wheels and try each one (or each PACKAGE) alone."""
    packages = read_packages()
    unknown = sorted(set(names) - set(packages))
    if unknown:
        msg = f"no package {', '.join(unknown)}; there are {', '.join(packages)}"
        raise click.ClickException(msg)
    with tempfile.TemporaryDirectory() as temporary:
        wheels = Path(temporary)
        build(packages.values(), wheels)
        for name in names or packages:
            start = time.perf_counter()
            missing = missing_from(wheel_of(packages[name], wheels), packages[name])
            if missing:
                msg = f"the wheel of {name} lacks {', '.join(missing)}"
                raise click.ClickException(msg)
            trial(packages[name], packages, wheels, tests=tests)
            click.echo(f"ok  {name:<24}{time.perf_counter() - start:5.1f} s")


if __name__ == "__main__":
    main()
