"""Versions that disagree are found, and a change is followed to the packages that need it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import workspace
from members import ROOT, affected, read_packages

ABOUT = "packages/omni-sp/src/omni_sp/__about__.py"


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(workspace.main, ["--root", str(root), *arguments])


def plant(root: Path, path: str, old: str, new: str) -> None:
    text = (root / path).read_text(encoding="utf-8")
    assert old in text, f"{path} holds no {old!r}"
    (root / path).write_text(text.replace(old, new), encoding="utf-8")


def test_packages_of_this_repository_agree():
    result = run(ROOT, "versions")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("path", "old", "new", "complaint"),
    [
        (ABOUT, "0.1.0", "0.2.0", "packages/omni-sp: version 0.2.0 is off the line"),
        (
            "packages/omni-sp/pyproject.toml",
            "omni-parallel-state>=0.1,<0.2",
            "omni-parallel-state>=0.1",
            "packages/omni-sp: asks for omni-parallel-state with >=0.1; expected >=0.1,<0.2",
        ),
        (
            "packages/omni-parallel/pyproject.toml",
            "omni-pp>=0.1,<0.2",
            "omni-pp",
            "packages/omni-parallel: asks for omni-pp with no range",
        ),
        (
            "packages/omni-pp/pyproject.toml",
            "torch>=2.13",
            "torch>=2.6",
            "packages/omni-pp: asks for torch with >=2.6; expected >=2.13",
        ),
        (
            "packages/omni-pp/pyproject.toml",
            '"torch>=2.13"',
            '"torchvision"',
            "packages/omni-pp: does not ask for torch",
        ),
        (
            "packages/omni-hsdp/pyproject.toml",
            'requires-python = ">=3.11"',
            'requires-python = ">=3.10"',
            "packages/omni-hsdp: requires-python is >=3.10; expected >=3.11",
        ),
        (
            "packages/omni-cfgp/pyproject.toml",
            'name = "omni-cfgp"',
            'name = "omni-cfg"',
            "packages/omni-cfgp: the folder holds the distribution omni-cfg",
        ),
        ("pyproject.toml", "torch==2.13.0", "torch==2.14.1", 'write torch = "2.14"'),
    ],
)
def test_a_planted_disagreement_is_named(copied_root: Path, path, old, new, complaint):
    plant(copied_root, path, old, new)
    result = run(copied_root, "versions")
    assert result.exit_code == 1
    assert complaint in result.output


def test_write_brings_ranges_and_floors_to_a_new_line_and_leaves_versions(copied_root: Path):
    plant(copied_root, "pyproject.toml", 'line = "0.1"', 'line = "1.4"')
    result = run(copied_root, "versions", "--write")
    assert "asks for" not in result.output
    assert "packages/omni-sp: version 0.1.0 is off the line; expected 1.4.*" in result.output
    umbrella = (copied_root / "packages/omni-parallel/pyproject.toml").read_text()
    assert umbrella.count(">=1.4,<2") == 7
    assert 'name = "omni-parallel"' in umbrella


def test_write_repairs_a_floor(copied_root: Path):
    plant(copied_root, "packages/omni-pp/pyproject.toml", "torch>=2.13", "torch>=2.6")
    assert run(copied_root, "versions", "--write").exit_code == 0
    assert run(copied_root, "versions").exit_code == 0


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("packages/omni-sp/src/omni_sp/sp_plan.py", ["omni-parallel", "omni-sp"]),
        ("packages/omni-parallel/README.md", ["omni-parallel"]),
        ("docs/index.md", []),
        ("README.md", []),
    ],
)
def test_a_change_affects_its_package_and_the_dependents(changed, expected):
    assert affected(read_packages(), [changed]) == expected


@pytest.mark.parametrize(
    "changed", ["packages/omni-group-coordinator/x.py", "hatch.toml", "tools/rank-harness/x.py"]
)
def test_what_everything_needs_affects_every_package(changed):
    packages = read_packages()
    assert affected(packages, [changed]) == sorted(packages)


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def test_affected_reads_the_difference_from_git(copied_root: Path):
    git(copied_root, "init", "-b", "main")
    git(copied_root, "add", "-A")
    git(copied_root, "commit", "-m", "first")
    plant(copied_root, ABOUT, "0.1.0", "0.1.1")
    result = run(copied_root, "affected", "--base", "main")
    assert json.loads(result.output) == ["omni-parallel", "omni-sp"]
    (copied_root / "packages/omni-pp/new.py").touch()
    result = run(copied_root, "affected", "--base", "main")
    assert json.loads(result.output) == ["omni-parallel", "omni-pp", "omni-sp"]


def test_affected_names_a_base_that_is_not_there(copied_root: Path):
    git(copied_root, "init")
    result = run(copied_root, "affected", "--base", "nowhere")
    assert result.exit_code == 1
    assert "cannot compare with 'nowhere'" in result.output
