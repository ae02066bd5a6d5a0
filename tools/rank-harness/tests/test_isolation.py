"""State that a test leaves in a rank process does not reach the next test."""

import contextvars
import os
import random
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

current = contextvars.ContextVar("current", default="nothing")


def make_a_mess():
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(1234)
    random.seed(1234)
    os.environ["LEFT_BEHIND"] = "1"
    os.environ.pop("PATH", None)
    os.chdir("/")
    sys.path.insert(0, "/left-behind")
    sys.stdout = sys.stderr
    warnings.simplefilter("ignore")
    current.set("something")
    dist.new_group([0])
    dist.new_group([0, 1])


def look_around():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device().type,
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "random": (torch.rand(3).tolist(), random.random()),
        "left behind": os.environ.get("LEFT_BEHIND"),
        "path": os.environ.get("PATH"),
        "rank": os.environ.get("RANK"),
        "folder": os.getcwd(),
        "search path": list(sys.path),
        "stdout": sys.stdout.fileno(),
        "filters": list(warnings.filters),
        "current": current.get(),
        "initialised": dist.is_initialized(),
        "group count": dist.distributed_c10d._world.group_count,
        "pid": os.getpid(),
    }


@pytest.mark.parametrize("init", [True, False])
def test_state_does_not_leak_into_the_next_run(ranks, init):
    before = ranks.run(look_around, init=init)
    ranks.run(make_a_mess)
    assert ranks.run(look_around, init=init) == before
    assert before[0]["initialised"] == init


def test_variables_of_one_run_are_gone_in_the_next(ranks):
    assert ranks.run(os.getenv, "EXTRA", env={"EXTRA": "yes"}) == ["yes", "yes"]
    assert ranks.run(os.getenv, "EXTRA") == [None, None]


def test_random_numbers_are_the_same_on_all_ranks_and_in_all_runs(ranks):
    first, second = ranks.run(torch.rand, 4), ranks.run(torch.rand, 4)
    assert all(torch.equal(first[0], other) for other in (*first, *second))


def test_group_of_a_failed_run_is_gone(ranks):
    def fails():
        dist.new_group([0, 1])
        raise ValueError

    ranks.outcomes(fails)
    assert ranks.run(dist.is_initialized, init=False) == [False, False]
    assert ranks.run(dist.get_rank) == [0, 1]


def test_failed_initialisation_leaves_no_trace(ranks):
    def rank_0_waits_in_vain():
        if os.environ["RANK"] == "0":
            store = dist.HashStore()
            dist.init_process_group(
                "gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.2)
            )

    outcomes = ranks.outcomes(rank_0_waits_in_vain, init=False)
    assert [outcome.status for outcome in outcomes] == ["raised", "ok"]
    assert ranks.run(dist.get_rank, timeout=10.0) == [0, 1]


def test_processes_are_reused_unless_they_end(ranks):
    pids = ranks.run(os.getpid, world_size=2)
    assert ranks.run(os.getpid, world_size=2) == pids
    ranks.outcomes(lambda: os._exit(0) if dist.get_rank() == 1 else None)
    after = ranks.run(os.getpid, world_size=2)
    assert after[0] == pids[0]
    assert after[1] != pids[1]
