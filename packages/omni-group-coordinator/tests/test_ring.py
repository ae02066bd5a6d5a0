import pytest
import torch
import torch.distributed as dist
from group_cases import Guarded, everyone, raised, same, seeded

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    RingComm,
    record_traffic,
    ring_shift,
)
from rank_harness import RankPool

worlds = pytest.mark.parametrize("world_size", [2, 3, 4])


def go_round() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    held = seeded(rank, 3, 5)
    for step in range(1, size + 1):
        with record_traffic() as traffic:
            held = ring_shift(held, group)
        same(held, seeded((rank - step) % size, 3, 5))
        assert (traffic.calls, traffic.total_bytes) == ({"ring": 1}, 60)


@worlds
def test_a_tensor_shifted_as_often_as_there_are_ranks_is_back(ranks: RankPool, world_size: int):
    ranks.run(go_round, world_size=world_size)


def shift_uneven() -> None:
    group = everyone()
    rank, lengths = group.rank_in_group, [3, 0, 2]
    pieces = [seeded(r, length, 2) for r, length in enumerate(lengths)]
    with record_traffic() as traffic:
        got = ring_shift(pieces[rank], group, pieces[rank - 1].shape)
    same(got, pieces[rank - 1])
    assert traffic.total_bytes == 8 * lengths[rank]


def test_shards_of_uneven_and_zero_length_are_shifted(ranks: RankPool):
    ranks.run(shift_uneven, world_size=3)


def rotate_keys_and_values() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    ring = RingComm(group)
    assert (ring.rank, ring.world_size) == (rank, size)
    assert (ring.send_rank, ring.recv_rank) == ((rank + 1) % size, (rank - 1) % size)
    key, value = seeded(rank, 2, 3), seeded(rank, 4, dtype=torch.int32)
    for step in range(1, size):
        with record_traffic() as traffic:
            next_key, next_value = ring.send_recv(key), ring.send_recv(value)
            ring.commit()
            ring.wait()
        assert (traffic.calls, traffic.total_bytes) == ({"ring": 1}, 24 + 16)
        key, value = next_key, next_value
        same(key, seeded((rank - step) % size, 2, 3))
        same(value, seeded((rank - step) % size, 4, dtype=torch.int32))


@worlds
def test_ring_comm_rotates_several_tensors_in_one_exchange(ranks: RankPool, world_size: int):
    ranks.run(rotate_keys_and_values, world_size=world_size)


def fill_own_buffers() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    previous = seeded((rank - 1) % size, 3, 4)
    ring = RingComm(group)
    strided, dense = Guarded(torch.full((3, 4), 9.0)), torch.full((3, 4), 9.0)
    turned = torch.full((4, 3), 9.0).t()
    sent = Guarded(seeded(rank, 3, 4))
    results = [ring.send_recv(sent.tensor, into) for into in (strided.tensor, dense, turned)]
    like = ring.send_recv(seeded(rank, 4, 3).t())
    ring.commit()
    ring.wait()
    assert results[0] is strided.tensor
    assert results[1] is dense
    assert results[2] is turned
    strided.holds(previous)
    sent.holds(seeded(rank, 3, 4))
    same(dense, previous)
    same(turned, previous)
    same(like, seeded((rank - 1) % size, 4, 3).t())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ring_comm_fills_the_callers_own_buffer_whatever_its_layout(
    ranks: RankPool, world_size: int
):
    ranks.run(fill_own_buffers, world_size=world_size)


def misuse() -> None:
    ring = RingComm(everyone())
    assert "wait called before commit" in raised(ring.wait, ParallelError)
    kept = ring.send_recv(seeded(ring.rank, 3))
    ring.commit()
    assert "commit called twice" in raised(ring.commit, ParallelError)
    assert "between commit and wait" in raised(lambda: ring.send_recv(kept), ParallelError)
    ring.wait()
    same(kept, seeded((ring.rank - 1) % ring.world_size, 3))
    assert "wait called before commit" in raised(ring.wait, ParallelError)
    ring.commit()  # of nothing
    ring.wait()


@pytest.mark.parametrize("world_size", [1, 2])
def test_ring_comm_used_in_another_order_says_what_to_call(ranks: RankPool, world_size: int):
    ranks.run(misuse, world_size=world_size)


def over_torch_groups() -> None:
    rank = dist.get_rank()
    same(ring_shift(seeded(rank, 3)), seeded((rank - 1) % 2, 3))
    same(ring_shift(seeded(rank, 3), dist.group.WORLD), seeded((rank - 1) % 2, 3))
    ring = RingComm(None)
    got = ring.send_recv(seeded(rank, 3))
    ring.commit()
    ring.wait()
    same(got, seeded((rank - 1) % 2, 3))


def test_a_ring_goes_over_a_torch_group_or_the_default_one(ranks: RankPool):
    ranks.run(over_torch_groups)


def test_a_ring_of_one_rank_gives_back_a_copy():
    alone = GroupCoordinator([[0]], 0, "gloo")
    mine = seeded(1, 3)
    same(ring_shift(mine, alone), mine)
    assert ring_shift(mine, alone) is not mine
    ring = RingComm(alone)
    got = ring.send_recv(mine)
    ring.commit()
    ring.wait()
    same(got, mine)
    assert (ring.send_rank, ring.recv_rank) == (0, 0)


def pass_on_another_dtype() -> None:
    ring = RingComm(everyone())
    message = raised(
        lambda: ring.send_recv(seeded(1, 2), seeded(2, 2, dtype=torch.int32)), ParallelConfigError
    )
    assert "torch.float32 tensor into a torch.int32 one" in message


def test_a_ring_moves_tensors_of_one_dtype(ranks: RankPool):
    ranks.run(pass_on_another_dtype)
