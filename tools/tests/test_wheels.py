"""What a wheel lacks, and what it needs without saying so, is found before it is published."""

from __future__ import annotations

import zipfile
from pathlib import Path

import click
import pytest

import wheels
from installed import closure, top_level_paths
from members import Package, read_packages


@pytest.fixture
def package() -> Package:
    return read_packages()["omni-sp"]


def write_wheel(folder: Path, package: Package, files: dict[str, str]) -> Path:
    wheel = folder / f"{package.import_name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def test_missing_files_are_named(tmp_path: Path, package: Package):
    info = f"omni_sp-{package.version}.dist-info"
    wheel = write_wheel(tmp_path, package, {"omni_sp/__init__.py": "", f"{info}/METADATA": ""})
    expected = ["omni_sp/py.typed", f"{info}/licenses/LICENSE"]
    assert wheels.missing_from(wheel, package) == expected


def test_a_complete_wheel_lacks_nothing(tmp_path: Path, package: Package):
    info = f"omni_sp-{package.version}.dist-info"
    files = {"omni_sp/py.typed": "", f"{info}/licenses/LICENSE": "Apache"}
    assert wheels.missing_from(write_wheel(tmp_path, package, files), package) == []


def test_an_extra_is_not_a_requirement(tmp_path: Path, package: Package):
    metadata = "Name: omni-sp\nRequires-Dist: torch>=2.13\nRequires-Dist: x>=1; extra == 'y'\n\n"
    files = {f"omni_sp-{package.version}.dist-info/METADATA": metadata}
    assert wheels.declared(write_wheel(tmp_path, package, files)) == ["torch>=2.13"]


def test_a_requirement_brings_its_own_and_no_more():
    brought = closure(["pytest>=9"])
    assert {"pytest", "pluggy", "iniconfig"} <= brought
    assert not {"torch", "numpy"} & brought


def test_only_the_files_of_a_distribution_are_lent(tmp_path: Path):
    wheels.lend(["iniconfig"], tmp_path / "lent")
    lent = {path.name.partition("-")[0] for path in (tmp_path / "lent").iterdir()}
    assert lent == {"iniconfig"}
    assert all(path.exists() for path in top_level_paths("pluggy"))


def test_an_environment_has_what_it_borrows_and_nothing_else(tmp_path: Path):
    made = wheels.Environment(tmp_path)
    made.borrow(["iniconfig"], "declared")
    assert made.execute("-c", "import iniconfig; print(iniconfig.__name__)") == "iniconfig\n"
    with pytest.raises(click.ClickException, match="No module named 'pluggy'"):
        made.execute("-c", "import pluggy")


def test_a_command_that_does_not_end_is_an_error():
    with pytest.raises(click.ClickException, match=r"sleep 60 \.\.\. did not end within 1 s"):
        wheels.run(["sleep", "60"], timeout=1)
