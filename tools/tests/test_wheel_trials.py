"""What is run in an environment of wheels passes on sound packages, and fails on others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from members import ROOT

SCRIPTS = ROOT / "tools" / "wheel_trials"
STRATEGIES = ("omni-sp", "omni-cfgp", "omni-pp", "omni-hsdp", "omni-vae-patch")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def on_ranks(ranks: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return run(*launcher, str(SCRIPTS / script), *arguments)


def test_every_strategy_draws_the_picture_of_one_process():
    names = [name.replace("-", "_") for name in STRATEGIES]
    done = on_ranks(2, "run_umbrella.py", *names)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_strategy_alone_draws_it_too():
    done = on_ranks(2, "run_strategy.py", "omni_sp")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("package", ["omni_sp", "omni_hsdp"])
def test_a_rank_that_does_all_of_the_work_is_found(package: str):
    done = on_ranks(1, "run_strategy.py", package)
    assert done.returncode != 0
    assert f"{package}: a rank had 100% of the" in done.stderr


def test_what_is_installed_is_what_the_umbrella_says():
    done = run(str(SCRIPTS / "ask_umbrella.py"), *STRATEGIES)
    assert done.returncode == 0, done.stderr


def test_a_package_that_should_be_missing_is_found():
    done = run(str(SCRIPTS / "ask_umbrella.py"), *STRATEGIES[1:])
    assert done.returncode == 1
    assert "unexpected: PackageVersion(name='omni-sp'" in done.stderr
