"""Importing a package brings in its own modules and nothing else that torch has not brought."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest

from members import ROOT, dependencies, read_packages

PACKAGES = read_packages()
IMPORTS = [*(package.import_name for package in PACKAGES.values()), "omni_parallel.v1"]
"""The umbrella's own import brings nothing; that of its API does."""

# Parts of torch that `import torch` leaves out, and that cost next to nothing. FSDP, DTensor and
# the symbolic shapes cost half a second and more: they are imported where they are used. (How long
# an import takes is measured by tools/check_wheels.py; here is what decides it.)
SMALL_PARTS = ("torch.distributed._composable",)

PROBE = """
import json, sys
import torch
before = set(sys.modules)
__import__(sys.argv[1])
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@cache
def imported(name: str) -> list[str]:
    """Import a package in a fresh interpreter; return the modules that came with it."""
    command = [sys.executable, "-c", PROBE, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return modules


def top(module: str) -> str:
    return module.partition(".")[0]


def foreign(modules: list[str]) -> list[str]:
    """Those that are neither of this repository, nor Python's, nor small parts of torch."""
    known = {*sys.stdlib_module_names, *(package.import_name for package in PACKAGES.values())}
    return [name for name in modules if top(name) not in known and not name.startswith(SMALL_PARTS)]


@pytest.mark.parametrize("name", IMPORTS)
def test_an_import_brings_no_other_library_and_no_large_part_of_torch(name: str):
    assert foreign(imported(name)) == []


def test_a_large_part_of_torch_is_found():
    assert "torch.distributed.tensor" in foreign(imported("torch.distributed.fsdp"))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_an_import_brings_only_the_packages_below(name: str):
    below = {PACKAGES[other].import_name for other in dependencies(PACKAGES, name)}
    found = {top(module) for module in imported(PACKAGES[name].import_name)}
    ours = {module for module in found if module.startswith("omni_")}
    assert ours <= {PACKAGES[name].import_name, *below}
    assert PACKAGES[name].import_name in ours


@pytest.mark.parametrize("name", ["omni_parallel", "omni_parallel.v1"])
def test_importing_the_umbrella_loads_no_strategy(name: str):
    strategies = {"omni_cfgp", "omni_hsdp", "omni_pp", "omni_sp", "omni_vae_patch"}
    assert not strategies & set(map(top, imported(name)))


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_package_ships_its_types_and_its_licence(name: str):
    package = PACKAGES[name]
    assert (package.source / "py.typed").is_file()
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
