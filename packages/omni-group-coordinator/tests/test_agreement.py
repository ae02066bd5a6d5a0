"""The debug mode: every rank raises and names the ranks that differ, before anything is sent."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from group_cases import everyone, raised, same, seeded

from omni_group_coordinator import (
    CommunicationError,
    GroupCoordinator,
    ParallelConfigError,
    RankMismatchError,
    RingComm,
    halo_exchange,
    record_traffic,
    ring_shift,
)
from omni_group_coordinator.agreement import debug_by_default, describe_call
from rank_harness import RankPool

Mistake = Callable[[GroupCoordinator, bool], object]


@pytest.mark.parametrize(
    ("value", "on"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_the_environment_turns_the_debug_mode_on(
    value: str | None, on: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMNI_PARALLEL_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("OMNI_PARALLEL_DEBUG", value)
    assert debug_by_default() is on


def test_a_call_is_described_by_operation_shape_dtype_and_the_rest():
    assert (
        describe_call("gather", ["*", 3], torch.bfloat16, "dst 1")
        == "gather of shape (*, 3) and dtype bfloat16, dst 1"
    )
    assert describe_call("x", (), torch.int8, "") == "x of shape () and dtype int8"


def other_shape(group: GroupCoordinator, odd: bool) -> object:
    return group.all_reduce(seeded(1, 3 if odd else 4, 2))


def other_dtype(group: GroupCoordinator, odd: bool) -> object:
    return group.all_reduce(seeded(1, 4, dtype=torch.int32 if odd else torch.float32))


def other_operation(group: GroupCoordinator, odd: bool) -> object:
    return group.broadcast(seeded(1, 4)) if odd else group.all_reduce(seeded(1, 4))


def other_reduction(group: GroupCoordinator, odd: bool) -> object:
    return group.all_reduce(seeded(1, 4), dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM)


def other_root(group: GroupCoordinator, odd: bool) -> object:
    return group.broadcast(seeded(1, 4), src=2 if odd else 0)


def other_destination(group: GroupCoordinator, odd: bool) -> object:
    return group.gather(seeded(1, 4), dst=2 if odd else 0)


def other_object_root(group: GroupCoordinator, odd: bool) -> object:
    return group.broadcast_object({"a": 1}, src=2 if odd else 0)


def other_lengths(group: GroupCoordinator, odd: bool) -> object:
    return group.all_gather(seeded(1, 5 if odd else 4, 3))


def other_pieces(group: GroupCoordinator, odd: bool) -> object:
    return group.reduce_scatter(seeded(1, 6), lengths=[4, 1, 1] if odd else [2, 2, 2])


def barrier_instead(group: GroupCoordinator, odd: bool) -> object:
    return group.barrier() if odd else group.all_reduce(seeded(1, 4))


AGREEMENTS = [
    (other_shape, "all_reduce of shape (4, 2) and dtype float32", "all_reduce of shape (3, 2)"),
    (other_dtype, "all_reduce of shape (4) and dtype float32", "shape (4) and dtype int32"),
    (other_operation, "all_reduce of shape (4)", "broadcast of shape (4)"),
    (other_reduction, "SUM", "MAX"),
    (other_root, "src 0", "src 2"),
    (other_destination, "dst 0", "dst 2"),
    (other_object_root, "broadcast_object of shape (1024) and dtype uint8, src 0", "src 2"),
    (other_lengths, "lengths [4, 4, 4]", "lengths [5, 5, 5]"),
    (other_pieces, "lengths [2, 2, 2]", "lengths [4, 1, 1]"),
    (barrier_instead, "all_reduce of shape (4)", "barrier of shape ()"),
]


def make_mistakes(mistakes: list[Mistake]) -> list[str]:
    """Rank 1 makes each mistake in turn; the group stays usable."""
    group = everyone(debug=True)
    odd = dist.get_rank() == 1
    messages = []
    for mistake in mistakes:
        with record_traffic() as traffic:
            messages.append(raised(lambda: mistake(group, odd), RankMismatchError))  # noqa: B023
        assert traffic.total_calls == 0
        same(group.all_reduce(torch.ones(2)), torch.full((2,), 3.0))
    return messages


def test_ranks_that_disagree_on_a_call_all_get_an_error_naming_both_sides(ranks: RankPool):
    everywhere = ranks.run(make_mistakes, [case[0] for case in AGREEMENTS], world_size=3)
    assert everywhere[0] == everywhere[1] == everywhere[2]
    for message, (_, most, one) in zip(everywhere[0], AGREEMENTS, strict=True):
        head, first, second = message.splitlines()
        assert head == "the ranks of group 'all' do not agree on the next operation:"
        assert first.startswith("  ranks 0, 2: ")
        assert most in first
        assert second.startswith("  rank 1: ")
        assert one in second


def other_split(group: GroupCoordinator, odd: bool) -> object:
    lengths = [3, 2, 1] if odd else [2, 2, 2]
    return group.all_to_all(seeded(1, 6, 2), 0, 1, scatter_lengths=lengths)


def other_halo(group: GroupCoordinator, odd: bool) -> object:
    return halo_exchange(seeded(1, 4, 2), 0, 2 if odd else 1, 1, group)


def other_ring_size(group: GroupCoordinator, odd: bool) -> object:
    return ring_shift(seeded(1, 7 if odd else 4), group)


def other_ring_comm(group: GroupCoordinator, odd: bool) -> object:
    ring = RingComm(group)
    ring.send_recv(seeded(1, 7 if odd else 4))
    return ring.commit()


EXCHANGES = [
    (
        other_split,
        "all_to_all of dtype float32",
        "rank 1 sends 6 elements to rank 0, which expects 4",
    ),
    (other_halo, "halo of dtype float32", "rank 0 sends 2 elements to rank 1, which expects 4"),
    (other_ring_size, "ring of 1 tensors", "rank 0 sends 4 elements to rank 1, which expects 7"),
    (other_ring_comm, "ring of 1 tensors", "rank 1 sends 7 elements to rank 2, which expects 4"),
]


def test_ranks_that_disagree_on_sizes_of_an_exchange_get_each_pair_named(ranks: RankPool):
    everywhere = ranks.run(make_mistakes, [case[0] for case in EXCHANGES], world_size=3)
    assert everywhere[0] == everywhere[1] == everywhere[2]
    for message, (_, call, pair) in zip(everywhere[0], EXCHANGES, strict=True):
        assert call in message
        assert "in group 'all': the ranks disagree on sizes" in message
        assert pair in message


def exchange_of_other_dtype() -> str:
    group = everyone(debug=True)
    dtype = torch.float16 if dist.get_rank() == 1 else torch.float32
    return raised(lambda: group.all_to_all(seeded(1, 2, 2, dtype=dtype), 0, 1), RankMismatchError)


def test_ranks_that_disagree_on_the_dtype_of_an_exchange_get_an_error_naming_both(
    ranks: RankPool,
):
    for message in ranks.run(exchange_of_other_dtype):
        assert "  rank 0: all_to_all of dtype float32" in message
        assert "  rank 1: all_to_all of dtype float16" in message


def long_call() -> str:
    group = everyone(debug=True)
    size = 2 if dist.get_rank() == 1 else 3
    return raised(lambda: group.all_reduce(seeded(1, *[1] * 400, size)), RankMismatchError)


def test_calls_too_long_for_the_message_are_still_told_apart(ranks: RankPool):
    for message in ranks.run(long_call):
        assert "  rank 0: all_reduce of shape (1, 1, " in message
        assert message.count("... #") == 2


def right_calls(debug: bool | None) -> tuple[int, list[str]]:
    ranks = list(range(dist.get_world_size()))
    group = GroupCoordinator([ranks], dist.get_rank(), "gloo", debug=debug)
    assert group.checked is not None
    rank, size = group.rank_in_group, group.world_size
    with record_traffic() as traffic:
        same(group.all_gather(seeded(rank, 2)), torch.cat([seeded(r, 2) for r in ranks]))
        same(group.broadcast(seeded(rank, 2), 1), seeded(1, 2))
        same(ring_shift(seeded(rank, 5), group), seeded((rank - 1) % size, 5))
        assert group.broadcast_object({"a": rank}, 1) == {"a": 1}
        group.barrier()
    return group.checked.debug, sorted(traffic.calls)


def test_the_debug_mode_follows_the_argument_and_else_the_environment(ranks: RankPool):
    on = {"OMNI_PARALLEL_DEBUG": "1"}
    results = {
        (argument, variable is not None): ranks.run(right_calls, argument, env=variable)
        for argument in (None, True, False)
        for variable in (None, on)
    }
    for (argument, variable), values in results.items():
        expected = variable if argument is None else argument
        assert {debug for debug, _ in values} == {expected}
    assert len({str(calls) for values in results.values() for _, calls in values}) == 1


def right_halo_and_exchange_in_debug() -> None:
    group = everyone(debug=True)
    rank, lengths = group.rank_in_group, [3, 0, 2]
    whole = seeded(5, 5, 3)
    mine = whole.split(lengths)[rank]
    before, after = halo_exchange(mine, 0, 4, 1, group, lengths)
    same(before, [whole[:0], whole[:0], whole[:3]][rank])
    same(after, [whole[3:4], whole[:0], whole[:0]][rank])
    out = group.all_to_all(mine, 1, 0, gather_lengths=lengths)
    same(out, whole[:, rank : rank + 1])


def test_right_calls_with_empty_shards_pass_the_debug_mode(ranks: RankPool):
    ranks.run(right_halo_and_exchange_in_debug, world_size=3)


def sent_and_awaited() -> str:
    group = everyone(debug=True, timeout=timedelta(seconds=2))
    if dist.get_rank() == 0:
        group.send(seeded(1, 3, 2))
        group.send(seeded(2, 3, 2).t())
        return raised(lambda: group.send(seeded(3, 3, 2)), CommunicationError)
    same(group.recv((3, 2), torch.float32), seeded(1, 3, 2))
    same(group.recv((2, 3), torch.float32), seeded(2, 3, 2).t())
    return raised(lambda: group.recv((2, 2), torch.float16), RankMismatchError)


def test_in_debug_mode_a_receiver_that_awaits_something_else_gets_an_error_naming_both(
    ranks: RankPool,
):
    message = ranks.run(sent_and_awaited)[1]
    assert "group rank 1 waits for a tensor of shape (2, 2) and dtype float16" in message
    assert "group rank 0 sends one of shape (3, 2) and dtype float32" in message


def no_cpu_group() -> str:
    group = everyone(debug=True)
    assert group.checked is not None
    name = dist.get_backend
    dist.get_backend = lambda _=None: "nccl"  # a device group that its owner passed alone
    try:
        return raised(lambda: group.all_reduce(seeded(1, 2)), ParallelConfigError)
    finally:
        dist.get_backend = name


def test_the_debug_mode_needs_a_group_that_moves_cpu_tensors(ranks: RankPool):
    for message in ranks.run(no_cpu_group):
        assert "needs a group that moves CPU tensors" in message
        assert "pass cpu_group=" in message
