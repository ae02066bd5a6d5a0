"""Wheels of this repository: how they are built, what is in them, and environments to try them in.

A trial's virtual environment borrows from this one exactly the third-party packages that its
wheels declare, and takes the packages of this repository from the fresh wheels only. An undeclared
dependency, which the shared development environment hides, fails there.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from packaging.requirements import Requirement

from installed import closure, top_level_paths
from members import ROOT, Package, Packages

# Files that a package must not lose on the way into its wheel, beside py.typed and LICENSE.
DATA = {"omni-parallel": ("omni_parallel/demo/model/",)}


def build(packages: Iterable[Package], folder: Path) -> None:
    """Build the packages' wheels into ``folder``, each in an isolated environment."""
    sources = [str(package.folder) for package in packages]
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), *sources])


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


class Environment:
    """A virtual environment with wheels of this repository and what they declare."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """For the trial's files."""
        venv.create(folder / "venv", with_pip=False)
        self.site = next(folder.glob("venv/lib/python*/site-packages"))
        """Where packages are installed."""
        self.python = folder / "venv" / "bin" / "python"
        """Its interpreter."""
        self._borrowed: list[str] = []

    def borrow(self, names: Iterable[str], title: str) -> None:
        """Have installed distributions of this environment found there too."""
        lend(names, self.folder / title)
        self.look_in(self.folder / title)

    def look_in(self, folder: Path) -> None:
        """Have packages in a folder found."""
        self._borrowed.append(str(folder))
        (self.site / "borrowed.pth").write_text("\n".join(self._borrowed))

    def install(self, wheels: Path, *names: str, alone: bool = False) -> None:
        """Install packages from the wheels, with those that they need or without."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q"]
        options = ["--no-deps"] if alone else []
        run([*pip, *options, "--no-index", "--find-links", str(wheels), *names])

    def execute(self, *arguments: str) -> str:
        """Run its interpreter, apart from the checkout and from what users have installed."""
        return run([str(self.python), "-I", *arguments], self.folder)

    def execute_on_ranks(self, script: Path, *arguments: str, ranks: int = 2) -> None:
        """Run a script with torch's launcher."""
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        self.execute(*launcher, str(script), *arguments)


@contextmanager
def environment(own: Iterable[Path], packages: Packages) -> Iterator[Environment]:
    """A fresh environment with the third-party packages that these wheels declare."""
    with TemporaryDirectory() as temporary:
        made = Environment(Path(temporary))
        made.borrow(third_party(own, packages), "declared")
        yield made


def run(command: Sequence[str], folder: Path = ROOT, timeout: float = 600) -> str:
    """Run a command; returns what it wrote.

    Raises:
        click.ClickException: It failed, or did not end in time.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        msg = f"{' '.join(command[:6])} ... did not end within {timeout:.0f} s"
        raise click.ClickException(msg) from error
    if done.returncode:
        msg = f"{' '.join(command[:6])} ...\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        raise click.ClickException(msg)
    return done.stdout
