"""Importing a package brings in what it declares and nothing else, at little cost beyond torch."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from installed import closure
from members import ROOT, dependencies, read_packages, read_toml

PACKAGES = read_packages()

# Imports torch with the parts of it that every package uses, then the package. Reports what came
# with the package alone, its distributions, and the processor time.
PROBE = """
import json, sys, time
from importlib.metadata import packages_distributions
import torch, torch.distributed, torch.distributed.device_mesh
before = set(sys.modules)
start = time.process_time()
__import__(sys.argv[1])
seconds = time.process_time() - start
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
owners = packages_distributions()
print(json.dumps({
    "seconds": seconds,
    "packages": sorted(name for name in tops if name.startswith("omni_")),
    "others": sorted({d for name in tops for d in owners.get(name, ()) if d[:5] != "omni-"}),
}))
"""


@cache
def imported(name: str) -> dict[str, Any]:
    """Import a package in a fresh interpreter and return what PROBE reports."""
    command = [sys.executable, "-c", PROBE, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("name", list(PACKAGES))
def test_an_import_brings_only_declared_packages(name: str):
    texts = read_toml(PACKAGES[name].folder / "pyproject.toml")["project"]["dependencies"]
    # torch takes numpy along where it is installed.
    undeclared = set(imported(PACKAGES[name].import_name)["others"]) - closure(texts) - {"numpy"}
    assert not undeclared


@pytest.mark.parametrize("name", list(PACKAGES))
def test_an_import_brings_only_the_packages_below(name: str):
    below = {PACKAGES[other].import_name for other in dependencies(PACKAGES, name)}
    found = set(imported(PACKAGES[name].import_name)["packages"])
    assert found <= {PACKAGES[name].import_name, *below}
    assert PACKAGES[name].import_name in found


def test_importing_the_umbrella_loads_no_strategy():
    strategies = {"omni_cfgp", "omni_hsdp", "omni_pp", "omni_sp", "omni_vae_patch"}
    assert not strategies & set(imported("omni_parallel")["packages"])


@pytest.mark.parametrize("name", list(PACKAGES))
def test_an_import_takes_little_beyond_torch(name: str):
    assert imported(PACKAGES[name].import_name)["seconds"] < 1.0


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_package_ships_its_types_and_its_licence(name: str):
    package = PACKAGES[name]
    assert (package.source / "py.typed").is_file()
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
