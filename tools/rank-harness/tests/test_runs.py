"""What a run gives back when every rank returns."""

import os
import sys
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist

FACTOR = 10


class Report:
    """A class of a test module, which no rank can import."""

    def __init__(self, rank):
        self.rank = rank


def scaled_rank():
    return FACTOR * dist.get_rank()


def sum_over_ranks(scale, *, offset=0.0):
    total = torch.full((2,), float(scale * (dist.get_rank() + 1)))
    dist.all_reduce(total)
    return total + offset


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_results_come_in_rank_order(ranks, world_size):
    expected = [FACTOR * rank for rank in range(world_size)]
    assert ranks.run(scaled_rank, world_size=world_size) == expected


def test_default_group_reduces_and_tensors_come_back(ranks):
    for total in ranks.run(sum_over_ranks, 3, offset=0.5, world_size=4):
        torch.testing.assert_close(total, torch.full((2,), 30.5))


def test_tensors_outlive_the_rank_that_made_them(ranks):
    def returns():
        return torch.arange(5)

    def dies():
        os._exit(0)

    values = ranks.run(returns)
    ranks.outcomes(dies)
    assert [value.tolist() for value in values] == [[0, 1, 2, 3, 4]] * 2


def test_closures_partials_and_lambdas_can_be_run(ranks):
    base = 5

    def closure():
        return base + dist.get_rank()

    assert ranks.run(closure) == [5, 6]
    assert ranks.run(partial(sum_over_ranks, 1, offset=1.0))[0].tolist() == [4.0, 4.0]
    assert ranks.run(lambda value: value * dist.get_world_size(), 4) == [8, 8]


def test_classes_of_the_test_module_keep_their_identity(ranks):
    reports = ranks.run(lambda: Report(dist.get_rank()))
    assert [type(report) for report in reports] == [Report, Report]
    assert [report.rank for report in reports] == [0, 1]


def test_each_rank_runs_one_thread(ranks):
    assert ranks.run(torch.get_num_threads) == [1, 1]
    assert ranks.run(os.getenv, "OMP_NUM_THREADS") == ["1", "1"]


def test_environment_is_that_of_torchrun(ranks):
    def read():
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        return [os.environ[name] for name in names]

    assert ranks.run(read, init=False) == [
        ["0", "0", "2", "127.0.0.1"],
        ["1", "1", "2", "127.0.0.1"],
    ]


def test_without_init_the_function_can_initialise_from_the_environment(ranks):
    def initialise():
        before = dist.is_initialized()
        dist.init_process_group("gloo", init_method="env://")
        return before, dist.get_world_size(), sum_over_ranks(1).tolist()

    for _ in range(2):
        assert ranks.run(initialise, init=False, world_size=3) == [(False, 3, [6.0, 6.0])] * 3


def test_function_may_destroy_the_group_itself(ranks):
    for _ in range(10):  # no rank may still be connecting when the first one destroys
        assert ranks.run(dist.destroy_process_group, world_size=4) == [None] * 4
    assert ranks.run(scaled_rank) == [0, 10]


def test_rank_that_returns_early_serves_the_others_until_they_are_done(ranks):
    def rank_0_holds_the_store_and_returns():
        dist.init_process_group("gloo", init_method="env://")
        if dist.get_rank() == 0:
            return 0
        time.sleep(0.5)
        pair = dist.new_group([1, 2], use_local_synchronization=True)
        total = torch.ones(1)
        dist.all_reduce(total, group=pair)
        return int(total)

    assert ranks.run(rank_0_holds_the_store_and_returns, init=False, world_size=3) == [0, 2, 2]


def test_warning_filters_of_the_caller_hold_in_the_ranks(ranks):
    def warn():
        warnings.warn("on purpose", FutureWarning, stacklevel=1)
        return "went on"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert ranks.run(warn, init=False) == ["went on", "went on"]
        warnings.filterwarnings("error", message="on pur", category=FutureWarning)
        outcomes = ranks.outcomes(warn, init=False)
    assert [type(outcome.exception) for outcome in outcomes] == [FutureWarning, FutureWarning]


def test_output_of_ranks_is_passed_on(ranks, capsys):
    def speak():
        sys.stdout.write("hello\n")
        os.write(2, b"from C++\n")

    ranks.run(speak)
    captured = capsys.readouterr()
    assert captured.out == "[rank 0] hello\n[rank 1] hello\n"
    assert captured.err == "[rank 0] from C++\n[rank 1] from C++\n"


def test_run_on_two_ranks_is_quick_after_start_up(ranks):
    ranks.run(scaled_rank)
    start = time.monotonic()
    ranks.run(scaled_rank)
    assert time.monotonic() - start < 5.0  # about 0.04 s; the machine may be busy
