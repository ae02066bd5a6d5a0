"""The debug mode: every rank raises and names the ranks that differ, before anything is sent."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from group_cases import everyone, raised, same, seeded

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    RankMismatchError,
    RingComm,
    all_to_all_4D,
    halo_exchange,
    record_traffic,
    ring_shift,
)
from omni_group_coordinator.agreement import debug_by_default, describe_call
from omni_group_coordinator.pending_work import wait_all
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


def locally_refused_split(group: GroupCoordinator, odd: bool) -> object:
    return group.reduce_scatter(seeded(1, 7 if odd else 6))


def locally_refused_heads(group: GroupCoordinator, odd: bool) -> object:
    return all_to_all_4D(seeded(1, 1, 4, 4 if odd else 3, 2), group=group)


def locally_refused_dim(group: GroupCoordinator, odd: bool) -> object:
    return group.all_gather(seeded(1, 2) if odd else seeded(1, 2, 2), dim=1)


def locally_refused_ndim(group: GroupCoordinator, odd: bool) -> object:
    return all_to_all_4D(seeded(1, 3, 3) if odd else seeded(1, 1, 3, 3, 1), group=group)


def locally_refused_halo(group: GroupCoordinator, odd: bool) -> object:
    return halo_exchange(seeded(1, 4), 0, -1 if odd else 1, 1, group)


def locally_refused_root(group: GroupCoordinator, odd: bool) -> object:
    return group.broadcast_object(1, 3 if odd else 0)


def locally_refused_layout(group: GroupCoordinator, odd: bool) -> object:
    return group.all_reduce(seeded(1, 2).to_sparse() if odd else seeded(1, 2))


def locally_refused_ring(group: GroupCoordinator, odd: bool) -> object:
    ring = RingComm(group)
    ring.send_recv(seeded(1, 2), torch.empty(2, dtype=torch.int32 if odd else torch.float32))
    return ring.commit()


def other_exchange_shape(group: GroupCoordinator, odd: bool) -> object:
    return group.all_to_all(seeded(1, *((3, 6) if odd else (6, 3))), 0, 1)


def other_exchange_dims(group: GroupCoordinator, odd: bool) -> object:
    return group.all_to_all(seeded(1, 3, 3), *((1, 0) if odd else (0, 1)))


def other_halo_shape(group: GroupCoordinator, odd: bool) -> object:
    return halo_exchange(seeded(1, 4, *((2, 3) if odd else (3, 2))), 0, 1, 1, group)


def other_number_of_tensors(group: GroupCoordinator, odd: bool) -> object:
    ring = RingComm(group)
    for _ in range(0 if odd else 2):
        ring.send_recv(seeded(1, 4))
    return ring.commit()


AGREEMENTS = [
    (locally_refused_split, "reduce_scatter of shape (6)", "refused reduce_scatter: dimension 0"),
    (locally_refused_heads, "all_to_all of shape (1, *, 3, 2)", "refused all_to_all: dimension 2"),
    (locally_refused_dim, "all_gather of shape (2, *)", "refused all_gather: dim=1 does not exist"),
    (locally_refused_ndim, "all_to_all of shape", "refused all_to_all_4D: all_to_all_4D takes"),
    (locally_refused_halo, "halo of shape (*)", "refused exchange_halo: a halo of -1 rows"),
    (locally_refused_root, "broadcast_object of shape", "refused broadcast_object: src=3"),
    (locally_refused_layout, "all_reduce of shape (2)", "refused all_reduce: a tensor of layout"),
    (locally_refused_ring, "ring of 1 tensors", "refused ring: send_recv of a torch.float32"),
    (other_exchange_shape, "all_to_all of shape (6, *)", "all_to_all of shape (3, *)"),
    (other_exchange_dims, "split 0 join 1", "split 1 join 0"),
    (other_halo_shape, "halo of shape (*, 3, 2)", "halo of shape (*, 2, 3)"),
    (other_number_of_tensors, "ring of 2 tensors", "ring of 0 tensors"),
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


def other_ring_shape(group: GroupCoordinator, odd: bool) -> object:
    return ring_shift(seeded(1, *((2, 2) if odd else (4,))), group)


def other_ring_dtype(group: GroupCoordinator, odd: bool) -> object:
    return ring_shift(seeded(1, 4, dtype=torch.int32 if odd else torch.float32), group)


def swapped_tensors(group: GroupCoordinator, odd: bool) -> object:
    """As many elements in sum, but not tensor by tensor."""
    ring = RingComm(group)
    for size in (2, 3) if odd else (3, 2):
        ring.send_recv(seeded(1, size))
    return ring.commit()


EXCHANGES = [
    (other_split, "all_to_all", "rank 1 sends 6 elements to rank 0, which expects 4 elements"),
    (other_halo, "halo", "rank 0 sends 2 elements to rank 1, which expects 4 elements"),
    (other_ring_size, "ring", "rank 0 sends (4) float32 to rank 1, which expects (7) float32"),
    (other_ring_comm, "ring", "rank 1 sends (7) float32 to rank 2, which expects (4) float32"),
    (other_ring_shape, "ring", "sends (4) float32 to rank 1, which expects (2, 2) float32"),
    (other_ring_dtype, "ring", "sends (4) float32 to rank 1, which expects (4) int32"),
    (swapped_tensors, "ring", "sends (3) float32, (2) float32 to rank 1, which expects (2) float"),
]


def test_ranks_that_disagree_on_sizes_of_an_exchange_get_each_pair_named(ranks: RankPool):
    everywhere = ranks.run(make_mistakes, [case[0] for case in EXCHANGES], world_size=3)
    assert everywhere[0] == everywhere[1] == everywhere[2]
    for message, (_, call, pair) in zip(everywhere[0], EXCHANGES, strict=True):
        assert message.startswith(call)
        assert "in group 'all': the ranks disagree on what they exchange" in message
        assert pair in message


def exchange_of_other_dtype() -> str:
    group = everyone(debug=True)
    dtype = torch.float16 if dist.get_rank() == 1 else torch.float32
    return raised(lambda: group.all_to_all(seeded(1, 2, 2, dtype=dtype), 0, 1), RankMismatchError)


def test_ranks_that_disagree_on_the_dtype_of_an_exchange_get_an_error_naming_both(
    ranks: RankPool,
):
    for message in ranks.run(exchange_of_other_dtype):
        assert "  rank 0: all_to_all of shape (2, *) and dtype float32" in message
        assert "  rank 1: all_to_all of shape (2, *) and dtype float16" in message


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
    group = everyone(debug=True)
    if dist.get_rank() == 0:
        group.send(seeded(1, 3, 2))
        group.send(seeded(2, 3, 2).t())
        message = raised(lambda: group.send(seeded(3, 3, 2)), RankMismatchError)
    else:
        same(group.recv((3, 2), torch.float32), seeded(1, 3, 2))
        same(group.recv((2, 3), torch.float32), seeded(2, 3, 2).t())
        message = raised(lambda: group.recv((2, 2), torch.float16), RankMismatchError)
    same(group.all_reduce(torch.ones(2)), torch.full((2,), 2.0))
    return message


def test_in_debug_mode_a_receiver_that_awaits_something_else_fails_together_with_the_sender(
    ranks: RankPool,
):
    sender, receiver = ranks.run(sent_and_awaited)
    assert sender == receiver
    assert "group rank 1 waits for a tensor of shape (2, 2) and dtype float16" in receiver
    assert "group rank 0 sends one of shape (3, 2) and dtype float32" in receiver


def cross_a_tensor_dict() -> None:
    """The answer to a debug header passes a message that is under way in its direction."""
    group = everyone(debug=True)
    if dist.get_rank() == 0:
        group.send(seeded(1, 3))
        received = group.recv_tensor_dict(1)
        assert received is not None
        same(received["a"], seeded(2, 4))
    else:
        works = group.isend_tensor_dict({"a": seeded(2, 4)}, 0)
        same(group.recv((3,), torch.float32, 0), seeded(1, 3))
        wait_all(works)


def test_the_answer_of_a_receiver_is_no_part_of_its_stream(ranks: RankPool):
    ranks.run(cross_a_tensor_dict)


def refuse_alike() -> str:
    group = everyone(debug=True)
    return raised(lambda: group.all_gather(seeded(1, 2), dim=1), ParallelConfigError)


def test_ranks_that_refuse_alike_raise_what_each_found(ranks: RankPool):
    assert all("dim=1 does not exist" in message for message in ranks.run(refuse_alike))


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
