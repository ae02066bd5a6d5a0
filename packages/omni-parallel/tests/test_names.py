"""Names of the packages below are found in the umbrella, whichever of them are installed."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import omni_parallel
from omni_parallel import _forwarding, names


def test_names_come_from_the_package_that_owns_them() -> None:
    import omni_parallel_state
    import omni_sp

    assert omni_parallel.get_sp_group is omni_parallel_state.get_sp_group
    assert omni_parallel.sp_shard is omni_sp.sp_shard
    assert omni_parallel.ParallelConfig is omni_parallel.v1.ParallelConfig


def test_all_names_resolve() -> None:
    for name in omni_parallel.__all__:
        assert getattr(omni_parallel, name) is not None
    assert {"parallelize", "sp_gather", "apply_hsdp_to_model"} <= set(dir(omni_parallel))


def test_a_name_of_nobody_says_what_is_installed() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'warp', .*omni_sp.* not installed may"):
        _ = omni_parallel.warp


def test_a_subset_has_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "entry_points", lambda group: ())
    assert "get_sp_group" in names.all_names()
    assert "sp_gather" not in names.all_names()
    with pytest.raises(AttributeError, match="sp_gather"):
        names.find_name("sp_gather")


def test_importing_it_imports_nothing_else() -> None:
    code = (
        "import sys, omni_parallel; print('torch' in sys.modules, len(omni_parallel.__version__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "5"]


MODULES = {
    "autoencoders": "omni_vae_patch",
    "autoencoders.distributed_vae_executor": "omni_vae_patch",
    "cfg_parallel": "omni_cfgp",
    "comm": "omni_group_coordinator",
    "group_coordinator": "omni_group_coordinator",
    "hsdp": "omni_hsdp",
    "hsdp_utils": "omni_hsdp",
    "parallel_state": "omni_parallel_state",
    "pipeline_parallel": "omni_pp",
    "sp_plan": "omni_sp",
    "sp_sharding": "omni_sp",
    "utils": "omni_group_coordinator",
    "vae_patch_parallel": "omni_vae_patch",
}
MIGRATION = Path(__file__).parents[3] / "docs" / "migration.md"


@pytest.mark.parametrize(("module", "package"), MODULES.items())
def test_code_moves_by_the_prefix_of_its_imports(module: str, package: str) -> None:
    here = importlib.import_module(f"omni_parallel.{module}")
    there = importlib.import_module(f"{package}.{module}")
    assert here.__all__
    for name in here.__all__:
        assert getattr(here, name) is getattr(there, name)
    found: dict[str, object] = {}
    exec(f"from omni_parallel.{module} import *", found)
    assert set(here.__all__) <= set(found)
    distribution = package.replace("_", "-")
    start = f"| `{module}` | `omni_parallel.{module}` | {distribution} |"
    (row,) = [line for line in MIGRATION.read_text().splitlines() if line.startswith(start)]
    assert set(re.findall(r"`(\w+)`", row.removeprefix(start))) <= set(here.__all__)


def test_a_module_of_a_package_that_is_missing_says_what_to_install(monkeypatch) -> None:
    get, public = _forwarding.forward("omni_absent.sp_plan", "omni-absent")
    for ask in (lambda: get("sp_shard"), public):
        with pytest.raises(ModuleNotFoundError, match="pip install omni-absent"):
            ask()
    monkeypatch.setitem(sys.modules, "omni_sp.sp_plan", None)
    with pytest.raises(ModuleNotFoundError, match="sp_plan"):
        _forwarding.forward("omni_sp.sp_plan", "omni-sp")[0]("x")
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        _ = importlib.import_module("omni_parallel.parallel_state").warp
