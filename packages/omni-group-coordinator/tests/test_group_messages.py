"""Tensors, plain data, dicts of tensors and channels between two ranks."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from group_cases import Guarded, everyone, raised, same, seeded

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
    RingComm,
    TensorSpec,
    halo_exchange,
    record_traffic,
)
from omni_group_coordinator.checked_group import PendingWork, wait_all
from omni_group_coordinator.wire import FRAME_BYTES, encode
from rank_harness import RankPool


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(torch.Size(shape), dtype)


def pass_round() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    previous = (rank - 1) % size
    for tensor in (lambda r: seeded(r, 3, 4), lambda r: Guarded(seeded(r, 3, 4)).tensor):
        # Even ranks send first, so that nobody waits for a neighbour who waits.
        if rank % 2 == 0:
            group.send(tensor(rank))
        got = group.recv((3, 4), torch.float32)
        if rank % 2 == 1:
            group.send(tensor(rank))
        same(got, seeded(previous, 3, 4))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_tensor_goes_to_the_next_rank_and_comes_from_the_previous_one(
    ranks: RankPool, world_size: int
):
    ranks.run(pass_round, world_size=world_size)


def off_the_host() -> list[str]:
    """What gloo says of messages of tensors that are not in the memory of the host."""
    group = everyone()
    tensor = torch.empty(3, 4, device="meta")
    ring = RingComm(group)
    ring.send_recv(tensor)
    calls = (
        lambda: group.send(tensor, 1 - group.rank_in_group),
        lambda: halo_exchange(tensor, 0, 1, 1, group),
        ring.commit,
    )
    return [raised(call, ParallelConfigError) for call in calls]


def test_messages_of_a_device_are_refused_on_gloo(ranks: RankPool):
    for found in ranks.run(off_the_host, world_size=2):
        for text in found:
            assert "group 'all' is of gloo, which moves meta tensors in collectives but" in text
            assert "make the group with the backend for meta" in text


def name_the_peer() -> None:
    group = everyone()
    if group.rank == 2:
        with record_traffic() as traffic:
            group.send(seeded(1, 5), dst=0)
            group.send(torch.empty(0, 3), dst=0)
        assert (traffic.calls, traffic.total_bytes) == ({"send": 1}, 20)
        group.send_object({"text": "x" * 3000}, 0)
    if group.rank == 0:
        same(group.recv(torch.Size([5]), torch.float32, src=2), seeded(1, 5))
        same(group.recv([0, 3], torch.float32, src=2), torch.empty(0, 3))
        assert group.recv_object(2) == {"text": "x" * 3000}


def test_peers_are_named_by_group_rank_and_empty_tensors_do_not_travel(ranks: RankPool):
    ranks.run(name_the_peer, world_size=3)


PLAIN = {
    "none": None,
    3: [True, 2.5, -(10**30), "漢"],
    "dtype": (torch.float8_e4m3fn, torch.Size([1, 2]), torch.device("cpu")),
    "$dict": {"deep": {"deeper": ()}},
}


def broadcast_objects() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    for src in range(size):
        for value in (PLAIN, "x" * 5000, None):
            # What the others hold is not read: it need not be plain.
            mine = value if rank == src else object()
            assert group.broadcast_object(mine, src) == value
        held = [src, "y" * 2000, None] if rank == src else [object()]
        assert group.broadcast_object_list(held, src) is held
        assert held == [src, "y" * 2000, None]


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_data_is_broadcast_from_any_rank(ranks: RankPool, world_size: int):
    ranks.run(broadcast_objects, world_size=world_size)


def everything() -> dict[str, Any]:
    return {
        "latent": seeded(1, 2, 3),
        "strided": Guarded(seeded(2, 3, 4)).tensor,
        "empty": torch.empty(0, 7, dtype=torch.int32),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "nothing": None,
        "inner": {"mask": seeded(3, 4, dtype=torch.bool), "%": {5: [seeded(4, 2), (1, "x")]}},
        "$tensor": {"$tensor": 1},
        "f8": seeded(5, 3).to(torch.float8_e5m2),
        "i16": seeded(6, 3, dtype=torch.int16),
        "shape": torch.Size([1, 2]),
        "long": "z" * (2 * FRAME_BYTES),
    }


def check(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, torch.Tensor):
        same(got, expected.contiguous())
    elif isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            check(got[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            check(one, other)
    else:
        assert got == expected


def no_pickle(*_: object, **__: object) -> NoReturn:
    msg = "something was pickled"
    raise AssertionError(msg)


def without_pickle() -> None:
    for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
        setattr(pickle, name, no_pickle)


def exchange_dicts() -> None:
    saved = dict(vars(pickle))
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    without_pickle()
    try:
        if rank == 0:
            assert group.send_tensor_dict(everything()) is None
            wait_all(group.isend_tensor_dict(everything(), size - 1))
            group.send_tensor_dict({}, size - 1)
        if rank == 1:
            check(group.recv_tensor_dict(), everything())
        if rank == size - 1:
            got, works, after = group.irecv_tensor_dict(0)
            assert after == []
            wait_all(works)
            assert all(work.is_completed() for work in works)
            check(got, everything())
            assert group.recv_tensor_dict(0) == {}
        for src in range(size):
            given = everything() if rank == src else None
            got_dict = group.broadcast_tensor_dict(given, src)
            if rank == src:
                assert got_dict is given
            check(got_dict, everything())
    finally:
        vars(pickle).update(saved)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_tensor_dict_arrives_as_it_was_sent_and_nothing_is_pickled(
    ranks: RankPool, world_size: int
):
    ranks.run(exchange_dicts, world_size=world_size)


def count_a_dict() -> None:
    group = everyone()
    with record_traffic() as traffic:
        if group.rank == 0:
            group.send_tensor_dict({"a": seeded(1, 3, 4), "b": torch.empty(0)})
        else:
            group.recv_tensor_dict()
    sent = {"metadata": FRAME_BYTES, "send tensor dict": 48} if group.rank == 0 else {}
    assert traffic.bytes_sent == sent
    assert traffic.total_calls == len(sent)


def test_a_short_dict_costs_one_frame_and_its_tensors(ranks: RankPool):
    ranks.run(count_a_dict)


def two_at_once() -> None:
    group = everyone()
    other = 1 - group.rank
    works: list[PendingWork] = []
    for turn in range(3):
        works += group.isend_tensor_dict({"a": seeded(10 * group.rank + turn, 50_000)}, other)
    assert not all(work.is_completed() for work in works)
    for turn in range(3):
        got, pending, _ = group.irecv_tensor_dict(other)
        wait_all(pending)
        same(got["a"], seeded(10 * other + turn, 50_000))
    wait_all(works)
    wait_all(works)  # again: nothing


def test_both_ranks_may_send_several_dicts_before_either_receives(ranks: RankPool):
    ranks.run(two_at_once)


NOT_PLAIN: list[Callable[[GroupCoordinator], object]] = [
    lambda g: g.send_object({"a": {1, 2}}, 1),
    lambda g: g.isend_tensor_dict({"a": object()}),
    lambda g: g.send_tensor_dict({"a": [b"bytes"]}),
    lambda g: g.send_object(torch.ones(2), 1),
]


def send_what_is_not_plain() -> None:
    group = everyone()
    if group.rank == 0:
        with record_traffic() as traffic:
            for call in NOT_PLAIN:
                message = raised(lambda: call(group), TypeError)  # noqa: B023
                assert "does not travel between ranks" in message
        assert traffic.total_calls == 0
        group.send_object("still in step", 1)
    else:
        assert group.recv_object(0) == "still in step"


def test_objects_that_are_not_plain_data_are_a_type_error_before_anything_is_sent(
    ranks: RankPool,
):
    ranks.run(send_what_is_not_plain)


NOT_PLAIN_FOR_ALL: list[Callable[[GroupCoordinator], object]] = [
    lambda g: g.broadcast_object(lambda: None, 0),
    lambda g: g.broadcast_object_list([1j], 0),
    lambda g: g.broadcast_tensor_dict({"a": {1}}, 0),
]


def broadcast_what_is_not_plain() -> None:
    group = everyone()
    for call in NOT_PLAIN_FOR_ALL:
        kind = TypeError if group.rank == 0 else ParallelError
        message = raised(lambda: call(group), kind)  # noqa: B023
        assert "does not travel between ranks" in message
        assert group.rank == 0 or "group rank 0 of group 'all' could not send" in message
    assert group.broadcast_object("still in step", 0) == "still in step"


def test_a_broadcast_of_what_is_not_plain_data_raises_on_every_rank(ranks: RankPool):
    ranks.run(broadcast_what_is_not_plain, world_size=3)


# -- channels ---------------------------------------------------------------------------------


def use_a_channel() -> None:
    group = everyone()
    metadata = []
    for turn in range(4):
        tensors = {
            "b": seeded(turn, 2, 3),
            "a": seeded(10 + turn, 4, dtype=torch.int64),
            "none": torch.empty(0, 2),
        }
        with record_traffic() as traffic:
            if group.rank == 0:
                wait_all(group.isend_registered("latent", tensors))
            else:
                got, works = group.irecv_registered("latent")
                wait_all(works)
                check(got, tensors)
        metadata.append(traffic.calls["metadata"])
        if group.rank == 0:
            assert traffic.bytes_sent["send channel"] == 24 + 32
        if turn == 2:
            group.reset_channels()
    assert metadata == ([1, 0, 0, 1] if group.rank == 0 else [0] * 4)


def test_a_channel_sends_metadata_at_its_first_use_only(ranks: RankPool):
    ranks.run(use_a_channel)


def receive_into_buffers() -> None:
    group = everyone()
    if group.rank == 0:
        for turn in range(3):
            wait_all(group.isend_registered("latent", {"a": seeded(turn, 2, 3)}))
        return
    got, works = group.irecv_registered("latent")
    wait_all(works)
    buffer = torch.full((2, 3), torch.nan)
    for turn in (1, 2):
        message = raised(
            lambda: group.irecv_registered("latent", buffers={"a": torch.empty(3, 2)}),
            RankMismatchError,
        )
        assert "a: (2, 3) float32 cpu, but the given buffers have a: (3, 2) float32 cpu" in message
        into, works = group.irecv_registered("latent", buffers={"a": buffer})
        wait_all(works)
        assert into["a"] is buffer
        same(buffer, seeded(turn, 2, 3))
    same(got["a"], seeded(0, 2, 3))


def test_a_channel_receives_into_buffers_that_are_given(ranks: RankPool):
    ranks.run(receive_into_buffers)


def drift() -> None:
    group = everyone(timeout=timedelta(seconds=5))
    first = {"a": seeded(1, 2, 3), "b": seeded(2, 2)}
    drifted = [
        ({"a": seeded(1, 3, 2), "b": seeded(2, 2)}, "this rank sends a: (3, 2) float32 cpu"),
        ({"a": seeded(1, 2, 3).half(), "b": seeded(2, 2)}, "a: (2, 3) float16 cpu"),
        ({"a": seeded(1, 2, 3)}, "sends a: (2, 3) float32 cpu;"),
        ({"b": seeded(2, 2), "a": seeded(1, 2, 3)}, "sends b: (2,) float32 cpu, a: (2, 3)"),
        ({"a": seeded(1, 2, 3), "c": seeded(2, 2)}, "c: (2,)"),
        ({}, "this rank sends nothing"),
    ]
    if group.rank == 1:
        for turn in range(2):
            got, works = group.irecv_registered("x")
            wait_all(works)
            same(got["a"], seeded(1 + turn, 2, 3))
        return
    wait_all(group.isend_registered("x", first))
    for tensors, expected in drifted:
        with record_traffic() as traffic:
            message = raised(lambda: group.isend_registered("x", tensors), RankMismatchError)  # noqa: B023
        assert "channel 'x' was opened with a: (2, 3) float32 cpu, b: (2,) float32 cpu" in message
        assert expected in message
        assert traffic.total_calls == 0
    wait_all(group.isend_registered("x", {"a": seeded(2, 2, 3), "b": seeded(2, 2)}))


def test_tensors_that_drift_from_their_channel_are_an_error_before_anything_is_sent(
    ranks: RankPool,
):
    ranks.run(drift)


def register_specs() -> None:
    group = everyone()
    if group.rank == 0:
        wait_all(group.isend_registered("right", {"a": seeded(1, 2)}))
        # These two are refused by their receiver at the header: nobody takes the tensors.
        kept = group.isend_registered("wrong", {"a": torch.empty(0, 3)})
        kept += group.isend_registered("other", {"a": torch.empty(0, 3)})
        wait_all(kept)
        group.recv_object(1)
        return
    group.register_recv_channel("right", {"a": spec(2)})
    got, works = group.irecv_registered("right")
    wait_all(works)
    same(got["a"], seeded(1, 2))
    group.register_recv_channel("right", {"a": spec(2)})  # the same again
    message = raised(
        lambda: group.register_recv_channel("right", {"a": spec(3)}), RankMismatchError
    )
    assert "group rank 0 sends a: (3,) float32 cpu" in message
    group.register_recv_channel("wrong", {"a": spec(0, 4)})
    message = raised(lambda: group.irecv_registered("wrong"), RankMismatchError)
    assert "opened with a: (0, 4) float32 cpu, but group rank 0 sends a: (0, 3)" in message
    message = raised(lambda: group.irecv_registered("expected"), RankMismatchError)
    assert "this rank receives channel 'expected', but group rank 0 sends" in message
    assert "'other'" in message
    group.send_object("done", 0)


def test_a_registered_channel_refuses_other_tensors_and_other_channels(ranks: RankPool):
    ranks.run(register_specs)


# -- peers ------------------------------------------------------------------------------------


def wrong_peers() -> None:
    group = everyone()
    calls: list[tuple[Callable[[int], object], str]] = [
        (lambda r: group.send(seeded(1, 2), r), "dst"),
        (lambda r: group.recv([2], torch.float32, r), "src"),
        (lambda r: group.send_object(1, r), "dst"),
        (group.recv_object, "src"),
        (lambda r: group.isend_tensor_dict({}, r), "dst"),
        (group.irecv_tensor_dict, "src"),
        (lambda r: group.isend_registered("x", {}, r), "dst"),
        (lambda r: group.irecv_registered("x", r), "src"),
    ]
    for call, role in calls:
        message = raised(lambda: call(3), ParallelConfigError)  # noqa: B023
        assert f"{role}=3 is no group rank of group 'all', which has 3 ranks" in message
        assert "0 to 2 (group ranks, not global ones)" in message
        message = raised(lambda: call(group.rank), ParallelConfigError)  # noqa: B023
        others = ", ".join(str(r) for r in range(3) if r != group.rank)
        assert f"{role}={group.rank} is this rank itself" in message
        assert message.endswith(f"legal here: {others}")


def test_a_peer_that_is_no_other_group_rank_is_refused(ranks: RankPool):
    ranks.run(wrong_peers, world_size=3)


def test_a_group_of_one_rank_has_nobody_to_send_to_but_dicts_pass_through():
    assert not dist.is_initialized()
    alone = GroupCoordinator([[0]], 0, "gloo", name="solo")
    mine = {"a": seeded(1, 2)}
    assert alone.isend_tensor_dict(mine) == []
    assert alone.irecv_tensor_dict() == ({}, [], [])
    assert alone.send_tensor_dict(mine) is mine
    assert alone.recv_tensor_dict() is None
    assert alone.isend_registered("x", mine) == []
    assert alone.irecv_registered("x") == ({}, [])
    for call in (
        lambda: alone.send(seeded(1, 2)),
        lambda: alone.recv((2,), torch.float32),
        lambda: alone.send_object(1, 0),
        lambda: alone.recv_object(0),
    ):
        with pytest.raises(ParallelConfigError, match="'solo' has one rank, which has no peer"):
            call()


def stray_header() -> str:
    group = everyone()
    if group.rank == 0:
        group.send(torch.arange(1, FRAME_BYTES + 1).to(torch.uint8))
        return ""
    from omni_group_coordinator import CommunicationError

    return raised(lambda: group.recv_object(0), CommunicationError)


def test_a_tensor_where_a_header_is_due_is_an_error(ranks: RankPool):
    assert "expected a header and found something else" in ranks.run(stray_header)[1]


def test_the_header_of_a_dict_is_text_that_anyone_can_read():
    assert encode({"a": (1, None)}) == b'{"a":{"$tuple":[1,null]}}'
