"""What was announced to go is gone in time, and not before."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.version import Version

import workspace
from deprecations import complaints, earliest_removal
from members import Package, read_packages

MARKED = """
from omni_group_coordinator import deprecation
from omni_group_coordinator.deprecation import deprecated

@deprecated(since="{since}", removed_in="{removed_in}", instead="split()")
def cut(): ...
"""


def planted(root: Path, text: str) -> Package:
    package = read_packages(root)["omni-sp"]
    (package.source / "plan.py").write_text(text)
    return package


@pytest.mark.parametrize("removed_in", ["0.1", "0.1.0", "0.0.9"])
def test_what_should_be_gone_is_named_with_its_place(copied_root: Path, removed_in: str):
    package = planted(copied_root, MARKED.format(since="0.0.1", removed_in=removed_in))
    found = "\n".join(complaints(package))
    place = "packages/omni-sp/src/omni_sp/plan.py:5: cut"
    assert f"{place} was to be gone in {removed_in}; this is 0.1.0" in found
    result = CliRunner().invoke(workspace.main, ["--root", str(copied_root), "versions"])
    assert result.exit_code == 1
    assert f"{place} was to be gone" in result.output


def test_what_goes_later_is_left_alone(copied_root: Path):
    package = planted(copied_root, MARKED.format(since="0.1", removed_in="0.3"))
    assert list(complaints(package)) == []


def test_what_would_go_too_early_is_named(copied_root: Path):
    package = planted(copied_root, MARKED.format(since="0.1", removed_in="0.2"))
    assert list(complaints(package)) == [
        "packages/omni-sp/src/omni_sp/plan.py:5: cut would go in 0.2; deprecated since 0.1, "
        "it stays until 0.3"
    ]


@pytest.mark.parametrize("change", ["deprecation.", "class A:\n    "])
def test_methods_and_dotted_names_are_seen(copied_root: Path, change: str):
    text = MARKED.format(since="0.0.1", removed_in="0.1")
    if change.endswith("."):
        text = text.replace("@deprecated", "@deprecation.deprecated")
    else:
        text = text.replace("@", "class A:\n    @").replace("def cut", "    def cut")
    assert "cut was to be gone" in next(complaints(planted(copied_root, text)))


@pytest.mark.parametrize("removed_in", ["soon", ""])
def test_a_version_that_is_none_is_an_error(copied_root: Path, removed_in: str):
    package = planted(copied_root, MARKED.format(since="0.1", removed_in=removed_in))
    with pytest.raises(ValueError, match=r"plan\.py:5: write removed_in out as a version"):
        list(complaints(package))


@pytest.mark.parametrize(
    ("since", "earliest"), [("0.1", "0.3"), ("0.1.4", "0.3"), ("1.0", "2.0"), ("1.6.1", "2.0")]
)
def test_a_whole_line_lies_between(since: str, earliest: str):
    assert earliest_removal(Version(since)) == Version(earliest)


def test_nothing_in_this_repository_is_overdue():
    assert [text for package in read_packages().values() for text in complaints(package)] == []
