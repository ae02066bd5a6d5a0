"""Group ranks are not global ranks; and what the reference implementation got wrong."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_cases import TIMEOUT, Guarded, everyone, raised, same, seeded
from torch import Tensor

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    PipelineGroupCoordinator,
    RingComm,
    SeqAllToAll4D,
    SeqAllToAll5D,
    SequenceParallelGroupCoordinator,
    all_to_all_4D,
    all_to_all_5D,
    halo_exchange,
    record_traffic,
    ring_shift,
)
from rank_harness import RankPool

LISTS = [[0, 1, 4, 5], [2, 3, 6, 7]]


def away_from_rank_0() -> None:
    group = GroupCoordinator(LISTS, dist.get_rank(), "gloo", timeout=TIMEOUT)
    ranks, place = group.ranks, group.rank_in_group
    assert ranks == LISTS[0 if group.rank in LISTS[0] else 1]
    pieces = [seeded(rank, 4, 3) for rank in ranks]
    mine = pieces[place]
    for src in range(4):
        same(group.broadcast(mine.clone(), src), pieces[src])
        assert group.broadcast_object({"from": group.rank}, src) == {"from": ranks[src]}
        told = group.broadcast_tensor_dict({"t": mine, "r": group.rank}, src)
        assert told is not None
        same(told["t"], pieces[src])
        assert told["r"] == ranks[src]
        joined = group.gather(mine, src, 0)
        assert (joined is None) == (place != src)
        if joined is not None:
            same(joined, torch.cat(pieces))
    assert group.all_gather_object({"from": group.rank}) == [{"from": rank} for rank in ranks]
    same(group.all_gather(mine, 1), torch.cat(pieces, 1))
    total = torch.stack(pieces).sum(0)
    torch.testing.assert_close(group.all_reduce(mine.clone()), total)
    torch.testing.assert_close(group.reduce_scatter(mine), total[place : place + 1])
    same(group.all_to_all(mine, 0, 1), torch.cat([p[place : place + 1] for p in pieces], 1))
    group.barrier()
    neighbours(group, pieces)
    messages(group)


def neighbours(group: GroupCoordinator, pieces: list[Tensor]) -> None:
    place = group.rank_in_group
    previous = pieces[(place - 1) % 4]
    same(ring_shift(pieces[place], group), previous)
    ring = RingComm(group)
    assert ring.send_rank == group.ranks[(place + 1) % 4] == group.next_rank
    assert ring.recv_rank == group.ranks[(place - 1) % 4] == group.prev_rank
    got = ring.send_recv(pieces[place])
    ring.commit()
    ring.wait()
    same(got, previous)
    before, after = halo_exchange(pieces[place], 0, 2, 5, group)
    whole = torch.cat(pieces)
    same(before, whole[max(0, 4 * place - 2) : 4 * place])
    same(after, whole[4 * place + 4 : 4 * place + 9])
    tokens = seeded(10 + group.first_rank, 1, 8, 4, 2)
    shard = tokens.chunk(4, 1)[place].clone().requires_grad_()
    out: Any = SeqAllToAll4D.apply(group, shard)
    same(out, tokens.chunk(4, 2)[place])
    same(all_to_all_4D(out.detach(), 1, 2, group), shard)


def messages(group: GroupCoordinator) -> None:
    """Group rank 0 sends to each of the others; each answers."""
    if group.rank_in_group == 0:
        for dst in (1, 2, 3):
            group.send(seeded(dst, 2), dst)
            assert group.recv_object(dst) == group.ranks[dst]
            group.send_tensor_dict({"a": seeded(dst, 3)}, dst)
            for work in group.isend_registered("c", {"a": seeded(dst, 4)}, dst):
                work.wait()
    else:
        same(group.recv([2], torch.float32, 0), seeded(group.rank_in_group, 2))
        group.send_object(group.rank, 0)
        got = group.recv_tensor_dict(0)
        assert got is not None
        same(got["a"], seeded(group.rank_in_group, 3))
        tensors, works = group.irecv_registered("c", 0)
        for work in works:
            work.wait()
        same(tensors["a"], seeded(group.rank_in_group, 4))


def test_a_group_that_does_not_start_at_rank_0_takes_group_ranks_everywhere(ranks: RankPool):
    ranks.run(away_from_rank_0, world_size=8)


def separate_tensors() -> None:
    group = everyone()
    pieces = [seeded(rank, 2, 3) for rank in range(group.world_size)]
    for dim in (0, 1, -1):
        listed = group.all_gather(pieces[group.rank], dim, separate_tensors=True)
        assert isinstance(listed, list)
        for piece, expected in zip(listed, pieces, strict=True):
            same(piece, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_separate_tensors_are_a_list_at_every_size_and_along_every_dimension(
    ranks: RankPool, world_size: int
):
    ranks.run(separate_tensors, world_size=world_size)


def over_other_groups() -> None:
    rank = dist.get_rank()
    group = GroupCoordinator([[0, 1], [2, 3]], rank, "gloo", timeout=TIMEOUT)
    all_ranks = [r for ranks in ([0, 2], [1, 3]) for r in [dist.new_group(ranks)] if r]
    other = next(g for g in all_ranks if isinstance(g, dist.ProcessGroup))
    column = [rank % 2, rank % 2 + 2]
    whole = torch.cat([seeded(r, 2) for r in column])
    same(group.all_gather(seeded(rank, 2), group=other), whole)
    assert group.broadcast_object_list([rank], 1, other) == [column[1]]
    same_dict = group.broadcast_tensor_dict({"a": seeded(rank, 2)}, 1, other)
    assert same_dict is not None
    same(same_dict["a"], seeded(column[1], 2))


def test_the_group_argument_is_not_ignored(ranks: RankPool):
    ranks.run(over_other_groups, world_size=4)


def over_a_metadata_group() -> None:
    group = everyone()
    beside = dist.new_group([0, 1])
    assert isinstance(beside, dist.ProcessGroup)
    used: list[tuple[torch.dtype, bool]] = []
    post = dist.broadcast

    def note(tensor: Tensor, **options: Any) -> None:
        used.append((tensor.dtype, options["group"] is beside))
        post(tensor, **options)

    dist.broadcast = note
    try:
        told = group.broadcast_tensor_dict({"a": seeded(1, 2)}, metadata_group=beside)
    finally:
        dist.broadcast = post
    assert told is not None
    same(told["a"], seeded(1, 2))
    assert used == [(torch.uint8, True), (torch.float32, False)]


def test_the_header_of_a_broadcast_dict_takes_the_metadata_group(ranks: RankPool):
    ranks.run(over_a_metadata_group)


def cpu_tensors_beside_a_device_group() -> None:
    device, cpu = dist.new_group([0, 1]), dist.new_group([0, 1])
    assert isinstance(device, dist.ProcessGroup)
    assert isinstance(cpu, dist.ProcessGroup)
    group = GroupCoordinator.from_process_group(device, cpu_group=cpu)
    used: list[bool] = []
    saved = (dist.broadcast, dist.isend, dist.irecv)

    def noting(post: Any) -> Any:
        def note(tensor: Tensor, *peer: Any, **options: Any) -> Any:
            used.append(options["group"] is cpu)
            return post(tensor, *peer, **options)

        return note

    dist.broadcast, dist.isend, dist.irecv = map(noting, saved)
    try:
        told = group.broadcast_tensor_dict({"a": seeded(group.rank, 2)})
        if group.rank == 0:
            group.send_tensor_dict({"a": seeded(0, 2)})
        else:
            group.recv_tensor_dict()
    finally:
        dist.broadcast, dist.isend, dist.irecv = saved
    assert told is not None
    same(told["a"], seeded(0, 2))
    assert used == [True] * 4


def test_cpu_tensors_in_a_dict_take_the_cpu_group(ranks: RankPool):
    """An accelerator's group (nccl) cannot move them."""
    ranks.run(cpu_tensors_beside_a_device_group)


def refuse() -> None:
    group = everyone()
    for call in (
        lambda: group.broadcast_object(1, 2),
        lambda: group.broadcast_object_list([1], 2),
        lambda: group.broadcast_tensor_dict({}, 2),
        lambda: group.broadcast(seeded(1, 2), 2),
    ):
        message = raised(call, ParallelConfigError)
        assert "src=2 is no group rank of group 'all', which has 2 ranks" in message


def test_a_source_outside_the_group_is_refused(ranks: RankPool):
    ranks.run(refuse)


def broadcast_a_dict() -> None:
    group = everyone()
    strided = Guarded(seeded(1, 2, 3))
    held = {"a": strided.tensor, "b": torch.empty(0, 2), "c": seeded(2, 2).to(torch.float8_e5m2)}
    with record_traffic() as traffic:
        told = group.broadcast_tensor_dict(held if group.rank == 1 else None, 1)
    assert told is not None
    same(told["a"], seeded(1, 2, 3))
    same(told["b"], torch.empty(0, 2))
    same(told["c"], seeded(2, 2).to(torch.float8_e5m2))
    strided.holds(seeded(1, 2, 3))
    sent = 2 * (1024 + 24 + 2) if group.rank == 1 else 0
    assert traffic.bytes_sent["broadcast"] == sent


def test_a_broadcast_dict_costs_one_frame_and_its_tensors(ranks: RankPool):
    ranks.run(broadcast_a_dict, world_size=3)


def without_gradients() -> None:
    group = everyone()
    with torch.inference_mode():
        same(group.all_reduce(torch.ones(2)), torch.full((2,), 2.0))
        same(group.all_gather(seeded(group.rank, 2)), torch.cat([seeded(r, 2) for r in range(2)]))
        same(group.broadcast(seeded(group.rank, 2)), seeded(0, 2))
        same(ring_shift(seeded(group.rank, 2), group), seeded(1 - group.rank, 2))


def test_collectives_run_in_inference_mode(ranks: RankPool):
    ranks.run(without_gradients)


REFERENCE = {
    "all_reduce": "input_ op",
    "all_gather": "input_ dim separate_tensors group",
    "gather": "input_ dst dim",
    "broadcast": "input_ src",
    "broadcast_object": "obj src",
    "broadcast_object_list": "obj_list src group",
    "send_object": "obj dst",
    "recv_object": "src",
    "broadcast_tensor_dict": "tensor_dict src group metadata_group",
    "isend_tensor_dict": "tensor_dict dst",
    "irecv_tensor_dict": "src",
    "send_tensor_dict": "tensor_dict dst",
    "recv_tensor_dict": "src",
    "barrier": "",
    "send": "tensor dst",
    "recv": "size dtype src",
    "destroy": "",
    "set_config": "dtype",
    "reset_buffer": "",
    "set_recv_buffer": "num_pipefusion_patches patches_shape_list feature_map_shape dtype",
    "set_extra_tensors_recv_buffer": "name shape num_buffers dtype",
    "pipeline_send": "tensor name segment_idx",
    "pipeline_isend": "tensor name segment_idx",
    "pipeline_recv": "idx name",
    "add_pipeline_recv_task": "idx name",
    "recv_next": "",
    "get_pipeline_recv_data": "idx name",
    "set_skip_tensor_recv_buffer": "patches_shape_list feature_map_shape",
    "pipeline_send_skip": "tensor",
    "pipeline_isend_skip": "tensor",
    "pipeline_recv_skip": "idx",
    "add_pipeline_recv_skip_task": "idx",
    "get_pipeline_recv_skip_data": "idx",
    "recv_skip_next": "",
}


@pytest.mark.parametrize("name", REFERENCE)
def test_methods_take_the_parameters_of_the_reference_in_its_order(name: str):
    found = list(inspect.signature(getattr(PipelineGroupCoordinator, name)).parameters.values())
    expected = REFERENCE[name].split()
    assert [parameter.name for parameter in found[1 : 1 + len(expected)]] == expected
    more = found[1 + len(expected) :]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in more)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GroupCoordinator, "group_ranks local_rank torch_distributed_backend"),
        (PipelineGroupCoordinator, "group_ranks local_rank torch_distributed_backend"),
        (SequenceParallelGroupCoordinator, "group_ranks local_rank torch_distributed_backend"),
        (RingComm, "process_group"),
        (all_to_all_4D, "input scatter_idx gather_idx group use_sync"),
        (all_to_all_5D, "input scatter_idx gather_idx group use_sync"),
        (SeqAllToAll4D.forward, "ctx group input scatter_idx gather_idx use_sync"),
        (SeqAllToAll5D.forward, "ctx group input scatter_idx gather_idx use_sync"),
        (RingComm.send_recv, "self to_send recv_tensor"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_constructors_and_functions_take_the_parameters_of_the_reference(
    kind: Callable[..., Any], expected: str
):
    names = list(inspect.signature(kind).parameters)
    assert names[: len(expected.split())] == expected.split()
