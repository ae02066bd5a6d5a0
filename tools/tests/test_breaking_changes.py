"""A change that breaks code of the last release is found; one that doesn't is let be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from packaging.version import Version

import breaking_changes
from breaking_changes import Tag, last_release
from members import read_packages

SOURCES = {
    "packages/omni-sp/src/omni_sp/__init__.py": """
from omni_sp._split import split
__all__ = ["split"]
""",
    "packages/omni-sp/src/omni_sp/_split.py": """
def split(tensor, dim=0, *, parts):
    return _pieces(tensor)

def _pieces(tensor): ...
""",
    "packages/omni-parallel/src/omni_parallel/v1/__init__.py": """
from omni_parallel.v1.versions import versions
__all__ = ["versions"]
""",
    "packages/omni-parallel/src/omni_parallel/v1/versions.py": "def versions(): ...\n",
}
SPLIT = "packages/omni-sp/src/omni_sp/_split.py"
FROZEN = "packages/omni-parallel/src/omni_parallel/v1/versions.py"


def git(root: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *settings, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def root(copied_root: Path) -> Path:
    """A repository whose packages are released as 0.1.0."""
    for package in read_packages(copied_root).values():
        (package.source / "__init__.py").touch()
    for path, text in SOURCES.items():
        (copied_root / path).parent.mkdir(exist_ok=True)
        (copied_root / path).write_text(text)
    git(copied_root, "init", "-b", "main")
    git(copied_root, "add", "-A")
    git(copied_root, "commit", "-m", "first")
    git(copied_root, "tag", "v0.1.0")
    return copied_root


def change(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))


def run(root: Path) -> Result:
    return CliRunner().invoke(breaking_changes.main, ["--root", str(root)])


def test_nothing_changed_breaks_nothing(root: Path):
    result = run(root)
    assert result.exit_code == 0, result.output
    assert "omni-sp 0.1.0 beside v0.1.0" in result.output
    assert "error" not in result.output


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("*, parts)", "*, parts, pad)", "split(pad): Parameter was added as required"),
        ("dim=0", "dim=1", "split(dim): Parameter default was changed"),
        ("dim=0, ", "", "split(dim): Parameter was removed"),
    ],
)
def test_a_signature_that_breaks_callers_is_an_error(root: Path, old: str, new: str, said: str):
    change(root, SPLIT, old, new)
    result = run(root)
    assert result.exit_code == 1
    assert said in result.output
    assert "1 changes break code that was written for the last release" in result.output


def test_a_name_that_is_gone_is_an_error(root: Path):
    change(root, "packages/omni-sp/src/omni_sp/__init__.py", "split", "_pieces")
    result = run(root)
    assert result.exit_code == 1
    assert "split: Public object was removed" in result.output


@pytest.mark.parametrize(("old", "new"), [("_pieces", "_parts"), ("parts)", "parts, pad=0)")])
def test_what_no_caller_notices_is_let_be(root: Path, old: str, new: str):
    change(root, SPLIT, old, new)
    assert run(root).exit_code == 0


def test_a_later_line_may_break_what_is_not_frozen(root: Path):
    for name in ("omni-sp", "omni-parallel"):
        about = f"packages/{name}/src/{name.replace('-', '_')}/__about__.py"
        change(root, about, "0.1.0", "0.2.0")
    change(root, SPLIT, "dim=0, ", "")
    result = run(root)
    assert result.exit_code == 0, result.output
    assert "break: " in result.output
    change(root, FROZEN, "versions()", "versions(name)")
    result = run(root)
    assert result.exit_code == 1
    assert "versions(name): Parameter was added as required" in result.output


def test_a_package_without_a_release_is_said_to_have_none(root: Path):
    git(root, "tag", "omni-sp-v0.1.0")
    git(root, "tag", "-d", "v0.1.0")
    change(root, SPLIT, "dim=0, ", "")
    result = run(root)
    assert "omni-pp: no release yet" in result.output
    assert "omni-sp 0.1.0 beside omni-sp-v0.1.0" in result.output
    assert result.exit_code == 1


def test_the_newest_release_is_taken_by_its_number():
    tags = ["v0.9.0", "v0.10.0", "omni-sp-v0.10.1", "omni-pp-v3.0.0", "v1.0.0rc1", "vast", "x"]
    assert last_release("omni-sp", tags) == Tag(Version("0.10.1"), "omni-sp-v0.10.1")
    assert last_release("omni-hsdp", tags) == Tag(Version("0.10.0"), "v0.10.0")
    assert last_release("omni-hsdp", ["vast"]) is None
