"""A rank that dies, hangs or does not come: the others get an error that names the group."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from group_cases import raised, same, seeded

from omni_group_coordinator import (
    CommunicationError,
    GroupCoordinator,
    RingComm,
    all_to_all_4D,
    halo_exchange,
    ring_shift,
)
from omni_group_coordinator.named_barrier import with_global_ranks
from rank_harness import RankPool

Operation = Callable[[GroupCoordinator], object]


def short(seconds: float = 1.0, debug: bool = False) -> GroupCoordinator:
    ranks = list(range(dist.get_world_size()))
    timeout = timedelta(seconds=seconds)
    return GroupCoordinator(
        [ranks], dist.get_rank(), "gloo", name="sp", timeout=timeout, debug=debug
    )


def ring_comm(group: GroupCoordinator) -> None:
    ring = RingComm(group)
    ring.send_recv(seeded(1, 4))
    ring.commit()
    ring.wait()


OPERATIONS: dict[str, tuple[Operation, str]] = {
    "all_reduce": (lambda g: g.all_reduce(seeded(1, 4)), "all_reduce"),
    "all_gather": (lambda g: g.all_gather(seeded(1, 4)), "all_gather"),
    "reduce_scatter": (lambda g: g.reduce_scatter(seeded(1, 6)), "reduce_scatter"),
    "all_to_all": (lambda g: g.all_to_all(seeded(1, 6, 6), 0, 1), "all_to_all"),
    "all_to_all_4D": (lambda g: all_to_all_4D(seeded(1, 1, 6, 6, 1), group=g), "all_to_all"),
    "broadcast": (lambda g: g.broadcast(seeded(1, 4), 1), "broadcast"),
    "broadcast_object": (lambda g: g.broadcast_object("x", 1), "broadcast"),
    "gather": (lambda g: g.gather(seeded(1, 4), 0) if g.rank == 0 else g.barrier(), ""),
    "ring_shift": (lambda g: ring_shift(seeded(1, 4), g), "ring"),
    "RingComm": (ring_comm, "ring"),
    "halo": (lambda g: halo_exchange(seeded(1, 4, 2), 0, 1, 1, g), "halo"),
    "recv": (lambda g: g.recv((4,), torch.float32, 1), "receive from group rank 1"),
    "recv_tensor_dict": (lambda g: g.recv_tensor_dict(1), "metadata from group rank 1"),
    "irecv_registered": (lambda g: g.irecv_registered("c", 1), "metadata from group rank 1"),
    "barrier": (lambda g: g.barrier(), "barrier"),
}


def meet_a_dead_rank(name: str, how: str) -> tuple[float, CommunicationError]:
    group = short(seconds=20)
    same(group.all_reduce(torch.ones(2)), torch.full((2,), 3.0))
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(CommunicationError) as caught:
        OPERATIONS[name][0](group)
    group.destroy()
    return time.monotonic() - started, caught.value


@pytest.mark.parametrize(
    ("name", "how"), [(name, ("exit", "kill")[i % 2]) for i, name in enumerate(OPERATIONS)]
)
def test_when_a_rank_dies_the_others_get_an_error_that_names_the_group(
    ranks: RankPool, name: str, how: str
):
    outcomes = ranks.outcomes(meet_a_dead_rank, name, how, world_size=3, timeout=40)
    assert (outcomes[1].status, outcomes[1].exit_code) == ("died", 3 if how == "exit" else -9)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.status == "ok", outcome.traceback
        seconds, error = outcome.value
        assert seconds < 15  # well within the timeout of 20 s
        assert (error.group, error.ranks) == ("sp", (0, 1, 2))
        assert OPERATIONS[name][1] in error.operation
        assert f"failed on rank {outcome.rank} in group 'sp' of ranks 0, 1, 2" in str(error)
        assert "(timeout 20 s)" in str(error)
        assert "The group is unusable now" in str(error)


WAITED_FOR = ["all_reduce", "broadcast", "halo", "recv"]


def do_not_come(names: list[str]) -> list[CommunicationError]:
    """Rank 1 stays away; a group that failed is destroyed and a new one made."""
    errors = []
    for name in names:
        group = short(seconds=1)
        if dist.get_rank() == 0:
            with pytest.raises(CommunicationError) as caught:
                OPERATIONS[name][0](group)
            errors.append(caught.value)
        dist.barrier()
        group.destroy()
    return errors


def test_a_timeout_names_group_ranks_and_operation(ranks: RankPool):
    errors = ranks.run(do_not_come, WAITED_FOR)[0]
    for name, error in zip(WAITED_FOR, errors, strict=True):
        operation = OPERATIONS[name][1]
        head = f"{error.operation} failed on rank 0 in group 'sp' of ranks 0, 1 (timeout 1 s): "
        assert str(error).startswith(head)
        assert operation in error.operation
        assert (error.group, error.ranks) == ("sp", (0, 1))
        assert "OMNI_PARALLEL_DEBUG=1" in str(error)
        assert "GLHF" not in str(error)
        assert "/" not in str(error).splitlines()[0]  # no path of the machine that built torch
        assert error.__cause__ is None or isinstance(error.__cause__, RuntimeError)


def barrier_without_two() -> str:
    group = short(seconds=1)
    if dist.get_rank() in (1, 3):
        time.sleep(1.5)
        return ""
    return raised(group.barrier, CommunicationError)


def test_a_barrier_names_the_ranks_that_did_not_come(ranks: RankPool):
    message = ranks.run(barrier_without_two, world_size=4)[0]
    assert message.splitlines()[0].endswith(": ranks 1, 3 did not come to the barrier in 1000 ms")


def barrier_of_three_without_two() -> str:
    """Global ranks 1, 2 and 3 are group ranks 0, 1 and 2."""
    timeout = timedelta(seconds=1)
    ranks = [[0], [1, 2, 3]]
    group = GroupCoordinator(ranks, dist.get_rank(), "gloo", name="late", timeout=timeout)
    if dist.get_rank() in (0, 2):
        time.sleep(1.5)
        return ""
    return raised(group.barrier, CommunicationError).splitlines()[0]


def test_a_barrier_names_missing_ranks_by_their_global_ranks(ranks: RankPool):
    messages = ranks.run(barrier_of_three_without_two, world_size=4)
    assert messages[1].endswith(": rank 2 did not come to the barrier in 1000 ms")
    assert "rank 1, to which the others report, did not let this one pass" in messages[3]


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 1000 ms",
            "ranks 5, 7 did not come to the barrier in 1000 ms",
        ),
        ("[Rank 0]: Rank 2 failed to pass monitoredBarrier in 9 ms", "rank 6 did not come"),
        ("Rank 2 successfully reached monitoredBarrier, but", "rank 4, to which the others report"),
        ("rank 1 is late", "rank 1 is late (group ranks; their global ranks are 4, 5, 6, 7)"),
    ],
)
def test_group_ranks_in_words_of_torch_become_global_ranks(reason: str, said: str):
    assert with_global_ranks(reason, (4, 5, 6, 7)).startswith(said)


def debug_timeout() -> str:
    group = short(seconds=1, debug=True)
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return ""
    return raised(lambda: group.all_reduce(seeded(1, 2)), CommunicationError)


def test_the_debug_mode_does_not_hang_where_a_rank_does_not_come(ranks: RankPool):
    message = ranks.run(debug_timeout)[0]
    assert message.startswith("all_reduce (debug check) failed on rank 0 in group 'sp'")
    assert "OMNI_PARALLEL_DEBUG" not in message  # it is on


def recover() -> None:
    """After a failure a new group over the same ranks works."""
    group = short(seconds=1)
    if dist.get_rank() == 0:
        raised(lambda: group.all_reduce(seeded(1, 2)), CommunicationError)
        raised(lambda: group.all_reduce(seeded(1, 2)), CommunicationError)
    dist.barrier()
    group.destroy()
    again = short(seconds=20)
    same(again.all_reduce(torch.ones(2)), torch.full((2,), 2.0))


def test_a_failed_group_stays_failed_and_a_new_one_works(ranks: RankPool):
    ranks.run(recover)


def fail_while_sending() -> str:
    group = short(seconds=1)
    if dist.get_rank() == 1:
        time.sleep(1.5)
        return ""
    works = group.isend_tensor_dict({"a": seeded(1, 1000)})
    message = raised(lambda: [work.wait() for work in works], CommunicationError)
    assert not works[-1].is_completed()
    return message


def test_a_send_that_nobody_takes_ends_at_the_timeout(ranks: RankPool):
    message = ranks.run(fail_while_sending)[0]
    assert "to group rank 1 failed on rank 0 in group 'sp'" in message
