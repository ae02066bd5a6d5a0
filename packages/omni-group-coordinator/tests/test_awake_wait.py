"""A collective on the CPU is waited for awake at first, and asleep when it takes long."""

import time
from typing import Any

import pytest

from omni_group_coordinator import GroupCoordinator, awake_wait
from omni_group_coordinator.awake_wait import wait_awake
from omni_group_coordinator.errors import CommunicationError
from rank_harness import RankPool


class Done:
    """A work that is done after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.waited = 0

    def is_completed(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> None:
        self.waited += 1


def test_it_looks_until_the_work_is_done_and_then_waits_for_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    yields = []
    monkeypatch.setattr(awake_wait, "_give_way", lambda: yields.append(1))
    work: Any = Done(looks=3)
    wait_awake(work)
    assert (len(yields), work.waited) == (3, 1)
    wait_awake(None)


def test_it_falls_asleep_when_the_work_takes_long() -> None:
    work: Any = Done(looks=10**9)
    start = time.monotonic()
    wait_awake(work)
    assert work.waited == 1
    assert time.monotonic() - start < 1


def lose_a_peer() -> str:
    import os

    import torch
    import torch.distributed as dist

    group = GroupCoordinator([[0, 1]], 0, "gloo")
    if dist.get_rank() == 1:
        os._exit(3)
    with pytest.raises(CommunicationError) as caught:
        group.all_to_all(torch.ones(2, 2), 0, 1)
    return str(caught.value)


def test_a_work_that_fails_while_it_is_waited_for_awake_raises(ranks: RankPool) -> None:
    outcome = ranks.outcomes(lose_a_peer, world_size=2)[0]
    assert "all_to_all failed on rank 0 in group" in outcome.value
