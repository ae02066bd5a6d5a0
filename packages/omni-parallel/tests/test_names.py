"""Names of the packages below are found in the umbrella, whichever of them are installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import omni_parallel
from omni_parallel import names


def test_names_come_from_the_package_that_owns_them() -> None:
    import omni_parallel_state
    import omni_sp

    assert omni_parallel.get_sp_group is omni_parallel_state.get_sp_group
    assert omni_parallel.sp_shard is omni_sp.sp_shard
    assert omni_parallel.parallel_state is omni_parallel_state.parallel_state
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
