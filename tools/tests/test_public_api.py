"""The snapshot shows what users may rely on, and every change of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import public_api
from members import read_packages

INIT = """
from omni_sp._hidden import Config as Config
from omni_sp.plan import split as split
from torch import Tensor

__all__ = ["Config", "split"]
"""
HIDDEN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    degree: int = 1
    _cache: int = 0

    @property
    def half(self) -> int:
        return self.degree // 2

    @classmethod
    def make(cls, /, *sizes: int, strict: bool = True, **more: str) -> "Config":
        return cls()
"""
PLAN = """
from torch import Tensor

LIMIT: int = 3

def split(tensor: Tensor, dim: int = 0, *, parts: int) -> list[Tensor]:
    return []

def _helper() -> None: ...
"""
EXPECTED = """\
# Public API of omni-sp

[omni_sp]
@dataclass(frozen=True) class Config
  def __init__(self, degree: int = 1, _cache: int = 0) -> None
  degree: int = 1
  property half: int
  classmethod def make(cls, /, *sizes: int, strict: bool = True, **more: str) -> Config
split = omni_sp.plan.split

[omni_sp.plan]
LIMIT: int = 3
def split(tensor: Tensor, dim: int = 0, *, parts: int) -> list[Tensor]
"""


@pytest.fixture
def root(copied_root: Path) -> Path:
    folder = copied_root / "packages/omni-sp/src/omni_sp"
    for name, text in {"__init__": INIT, "_hidden": HIDDEN, "plan": PLAN}.items():
        (folder / f"{name}.py").write_text(text)
    for package in read_packages(copied_root).values():
        (package.source / "__init__.py").touch()
    return copied_root


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(public_api.main, ["--root", str(root), *arguments])


def test_public_names_are_listed_with_their_signatures(root: Path):
    assert public_api.snapshot(read_packages(root)["omni-sp"]) == EXPECTED


def test_a_new_parameter_makes_the_snapshot_stale(root: Path):
    run(root)
    assert run(root, "--check").exit_code == 0
    path = root / "packages/omni-sp/src/omni_sp/plan.py"
    path.write_text(path.read_text().replace("parts: int", "parts: int, pad: bool"))
    result = run(root, "--check")
    assert result.exit_code == 1
    assert "stale in docs/api: omni_sp.txt;" in result.output


def test_a_change_behind_the_public_names_leaves_the_snapshot(root: Path):
    run(root)
    path = root / "packages/omni-sp/src/omni_sp/plan.py"
    path.write_text(path.read_text().replace("_helper()", "_helper(more: int)"))
    assert run(root, "--check").exit_code == 0


def test_a_listed_name_that_is_missing_is_an_error(root: Path):
    path = root / "packages/omni-sp/src/omni_sp/__init__.py"
    path.write_text(path.read_text().replace('"split"', '"splitt"'))
    with pytest.raises(ValueError, match=r"omni_sp\.__all__ lists splitt, which"):
        public_api.snapshot(read_packages(root)["omni-sp"])
