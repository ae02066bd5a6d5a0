"""What a run gives back when ranks raise, die or hang, and that the next run works."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rank_harness import RankFailure, RemoteError


class UnpicklableError(Exception):
    """Cannot be rebuilt from its args."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class OwnError(Exception):
    """An exception of the test module."""


def fails_on_rank_1():
    if dist.get_rank() == 1:
        deeper = {"rank": 1}
        raise OwnError(deeper)
    dist.barrier()


def works(ranks, world_size=2):
    assert ranks.run(dist.get_rank, world_size=world_size) == list(range(world_size))


def test_failure_shows_the_traceback_of_the_first_rank_to_fail_first(ranks):
    with pytest.raises(RankFailure) as info:
        ranks.run(fails_on_rank_1, world_size=3)
    text = str(info.value)
    assert text.startswith("3 of 3 ranks failed")
    first, others = text.index("=== rank 1 raised OwnError"), text.index("=== rank 0 raised")
    assert first < others
    assert "in fails_on_rank_1" in text
    assert "raise OwnError(deeper)" in text
    assert "OwnError: {'rank': 1}" in text
    assert isinstance(info.value.outcomes[1].exception, OwnError)
    works(ranks, 3)


def test_rank_that_raises_frees_the_others_at_once(ranks):
    start = time.monotonic()
    outcomes = ranks.outcomes(fails_on_rank_1, world_size=3)
    assert time.monotonic() - start < 10.0
    assert [outcome.status for outcome in outcomes] == ["raised"] * 3
    assert isinstance(outcomes[0].exception, RuntimeError)


def test_output_of_the_failing_rank_is_shown_up_to_50_lines(ranks):
    def speaks_then_fails():
        for number in range(60):
            sys.stdout.write(f"line {number};\n")
        raise ValueError(number)

    with pytest.raises(RankFailure) as info:
        ranks.run(speaks_then_fails, world_size=1)
    assert "last 50 of 60 lines" in str(info.value)
    assert "line 9;" not in str(info.value)
    assert "line 10;" in str(info.value)


def test_assertion_messages_survive(ranks):
    def checks():
        assert dist.get_rank() == 0, "only rank 0 passes"

    failed = ranks.outcomes(checks)[1]
    assert isinstance(failed.exception, AssertionError)
    assert "only rank 0 passes" in failed.traceback


def test_exception_that_cannot_be_pickled_comes_as_a_remote_error(ranks):
    def fails():
        raise UnpicklableError(1, 2)

    (outcome,) = ranks.outcomes(fails, world_size=1)
    assert isinstance(outcome.exception, RemoteError)
    assert outcome.exception.type_name.endswith("UnpicklableError")
    assert outcome.exception.text == "1 and 2"
    assert "UnpicklableError: 1 and 2" in outcome.traceback


def test_result_that_cannot_be_pickled_is_an_error_of_the_rank(ranks):
    (outcome,) = ranks.outcomes(threading.Lock, world_size=1)
    assert outcome.status == "raised"
    assert isinstance(outcome.exception, TypeError)


def test_system_exit_is_an_exception_of_the_rank(ranks):
    (outcome,) = ranks.outcomes(sys.exit, 3, world_size=1)
    assert (outcome.status, type(outcome.exception)) == ("raised", SystemExit)


def test_killed_rank_is_reported_and_the_others_get_their_errors(ranks):
    def killed():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    outcomes = ranks.outcomes(killed, world_size=3)
    assert [outcome.status for outcome in outcomes] == ["raised", "died", "raised"]
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert isinstance(outcomes[0].exception, RuntimeError)
    assert "=== rank 1 died of SIGKILL" in str(RankFailure(outcomes))
    works(ranks, 3)


def test_rank_that_exits_is_reported_with_its_code_and_last_words(ranks):
    def leaves():
        sys.stdout.write("leaving\n")
        os._exit(7)

    (outcome,) = ranks.outcomes(leaves, world_size=1)
    assert (outcome.status, outcome.exit_code, outcome.stdout) == ("died", 7, "leaving\n")
    assert "=== rank 0 died with exit code 7" in str(RankFailure([outcome]))
    works(ranks)


def test_crash_shows_the_stack(ranks):
    (outcome,) = ranks.outcomes(os.abort, world_size=1)
    assert outcome.exit_code == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in outcome.stderr
    works(ranks)


def test_hung_rank_is_ended_with_its_stack(ranks):
    def hangs():
        if dist.get_rank() == 1:
            time.sleep(600)

    start = time.monotonic()
    outcomes = ranks.outcomes(hangs, timeout=1.0)
    assert time.monotonic() - start < 20.0
    assert [outcome.status for outcome in outcomes] == ["ok", "hung"]
    assert "in hangs" in outcomes[1].stack
    assert "in hangs" in str(RankFailure(outcomes))
    works(ranks)


def test_ranks_stuck_in_a_collective_are_ended_with_their_stacks(ranks):
    def deadlock():
        dist.init_process_group("gloo", timeout=timedelta(minutes=10))
        dist.recv(torch.ones(1), src=1 - dist.get_rank())

    outcomes = ranks.outcomes(deadlock, init=False, timeout=1.5)
    assert [outcome.status for outcome in outcomes] == ["hung", "hung"]
    assert all("in recv" in outcome.stack for outcome in outcomes)
    works(ranks)


def test_stopped_rank_is_ended(ranks):
    def stops():
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)

    (outcome,) = ranks.outcomes(stops, world_size=1, timeout=1.0)
    assert outcome.status == "hung"
    assert "in stops" in outcome.stack
    works(ranks)


def test_deadlock_in_the_default_group_is_an_error_before_the_timeout(ranks):
    def deadlock():
        dist.recv(torch.ones(1), src=1 - dist.get_rank())

    outcomes = ranks.outcomes(deadlock, timeout=2.5)
    assert [outcome.status for outcome in outcomes] == ["raised", "raised"]
    assert any("recv" in str(outcome.exception) for outcome in outcomes)
    works(ranks)


def test_function_that_cannot_be_pickled_is_refused_before_any_rank_starts(ranks):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        ranks.run(lock.locked)
    works(ranks)
