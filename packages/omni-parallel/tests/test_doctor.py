"""``omni-parallel doctor``: real collectives, and what is wrong in plain words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from omni_group_coordinator import GroupCoordinator
from omni_parallel.doctor import command, examination
from omni_parallel.doctor.findings import Machine, findings
from omni_parallel.doctor.self_test import Measured, SelfTest, measure
from omni_parallel.v1 import PackageVersion
from omni_parallel_state import ParallelLayout, ParallelState

CLI = "from omni_parallel.cli import main; main()"
MACHINE = Machine(
    "3.11", "2.13", "Linux x86_64", 8, "cuda", ("cuda:0", "cuda:1"), ("gloo", "nccl"),
    {"diffusers": True, "transformers": True, "peft": True},
)  # fmt: skip
TEST = SelfTest(
    "gloo", "cpu", [Measured("all-reduce", True, 10.0, 1.0)], {"0-1": 20.0, "0-2": 19.0}
)
PACKAGES = (PackageVersion("omni-parallel", "0.1.0"), PackageVersion("omni-sp", "0.1.0", ("sp",)))


def test_it_tries_what_is_here() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLI, "doctor", "--nproc", "3", "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["command"], found["passed"], found["error"]) == ("doctor", True, None)
    assert found["ranks"] == 3
    assert found["seconds"] > 0
    assert [one["operation"] for one in found["self_test"]["operations"]] == [
        "all-reduce", "all-gather", "all-to-all",
    ]  # fmt: skip
    assert all(one["right"] for one in found["self_test"]["operations"])
    assert set(found["self_test"]["links"]) == {"0-1", "0-2", "1-2"}
    assert found["machine"]["torch"] == torch.__version__
    assert {package["name"] for package in found["packages"]} >= {"omni-sp", "omni-pp"}


def lying() -> list[bool]:
    state = ParallelState(ParallelLayout(dp=2))
    honest = GroupCoordinator.all_gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GroupCoordinator, "all_gather", lambda self, x, *a, **k: honest(self, x + 1, *a, **k)
        )
        found = measure(state)
    return [one.right for one in found.operations]


def test_wrong_data_is_seen(ranks) -> None:
    assert ranks.run(lying, world_size=2) == [[True, False, True]] * 2


def test_nothing_is_wrong() -> None:
    assert findings(MACHINE, PACKAGES, TEST, 2) == []


@pytest.mark.parametrize(
    ("machine", "packages", "test", "ranks", "said"),
    [
        (MACHINE, PACKAGES, TEST, 3, "3 ranks need as many accelerators, here is 2"),
        (replace(MACHINE, accelerator=None), PACKAGES, TEST, 2, "there is no accelerator"),
        (
            replace(MACHINE, libraries={"diffusers": False}),
            PACKAGES, TEST, 2, "try: pip install 'omni-parallel[diffusers]'",
        ),
        (
            MACHINE, (*PACKAGES, PackageVersion("omni-pp", None)),
            TEST, 2, "not installed: omni-pp; try: pip install omni-pp",
        ),
        (
            MACHINE, (PackageVersion("omni-sp", "0.2.0", problem="does not go"),),
            TEST, 2, "does not go",
        ),
        (
            MACHINE, PACKAGES, replace(TEST, operations=[Measured("all-gather", False, 1, 1)]),
            2, "all-gather gives wrong data",
        ),
        (
            MACHINE, PACKAGES, replace(TEST, links={"0-1": 40.0, "0-2": 5.0}),
            2, "ranks 0 and 2 send 5.0 GB/s to each other, others up to 40.0",
        ),
        (MACHINE, PACKAGES, "rank 1 was", 2, "ranks cannot work together: rank 1 was"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(machine, packages, test, ranks, said) -> None:
    (found,) = findings(machine, packages, test, ranks)
    assert said in found


@pytest.mark.parametrize(
    ("test", "packages", "status"),
    [
        (TEST, PACKAGES, 0),
        ("rank 1 was the first to fail", PACKAGES, 1),
        (replace(TEST, operations=[Measured("all-gather", False, 1, 1)]), PACKAGES, 1),
        (TEST, (PackageVersion("omni-sp", "0.2.0", problem="does not go"),), 1),
    ],
)
def test_the_status_says_whether_ranks_can_work(monkeypatch, test, packages, status) -> None:
    monkeypatch.setattr(examination, "_tried", lambda *_: test)
    monkeypatch.setattr(examination, "versions", lambda: packages)
    result = CliRunner().invoke(command.doctor, [])
    assert result.exit_code == status
    assert max(map(len, result.output.splitlines())) <= 100
