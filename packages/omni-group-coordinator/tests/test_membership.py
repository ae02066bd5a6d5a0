"""How a coordinator is built, and where its rank stands."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from group_cases import TIMEOUT, everyone, raised, same, seeded
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    ProcessGroupPool,
    all_to_all_4D,
    halo_exchange,
    record_traffic,
)
from omni_group_coordinator.checked_group import CheckedGroup
from rank_harness import RankPool


def works(group: GroupCoordinator) -> None:
    """A collective and a message pass, whatever the group was built from."""
    tensors = [seeded(rank, 3) for rank in group.ranks]
    same(group.all_gather(seeded(group.rank, 3)), torch.cat(tensors))
    if group.is_first_rank:
        group.send_object([group.rank], group.world_size - 1)
    if group.is_last_rank:
        assert group.recv_object(0) == [group.first_rank]
    group.barrier()


def from_rank_lists() -> None:
    rank = dist.get_rank()
    group = GroupCoordinator([[1, 0], [3, 2]], rank, "gloo", timeout=TIMEOUT)
    mine = [0, 1] if rank < 2 else [2, 3]
    assert group.ranks == mine  # ascending, whatever the order of the list
    assert (group.rank, group.local_rank, group.world_size) == (rank, rank, 2)
    assert (group.rank_in_group, group.device) == (rank % 2, torch.device("cpu"))
    assert (group.first_rank, group.last_rank) == (mine[0], mine[1])
    assert (group.is_first_rank, group.is_last_rank) == (rank % 2 == 0, rank % 2 == 1)
    assert repr(group) == f"GroupCoordinator('group', ranks={mine}, rank={rank})"
    assert group.device_group is group.cpu_group is not None
    works(group)
    group.destroy()


def test_a_coordinator_is_built_from_rank_lists(ranks: RankPool):
    ranks.run(from_rank_lists, world_size=4)


def from_groups() -> None:
    rank = dist.get_rank()
    torch_group = dist.new_group([1, 2])
    beside = dist.new_group([1, 2])
    if rank != 0:
        assert isinstance(torch_group, dist.ProcessGroup)
        assert isinstance(beside, dist.ProcessGroup)
        group = GroupCoordinator.from_process_group(torch_group, name="mine", timeout=TIMEOUT)
        assert (group.name, group.ranks, group.rank_in_group) == ("mine", [1, 2], rank - 1)
        assert group.device_group is torch_group
        assert group.cpu_group is torch_group
        works(group)
        group.destroy()
        two = GroupCoordinator.from_process_group(torch_group, cpu_group=beside)
        assert (two.device_group, two.cpu_group) == (torch_group, beside)
        works(two)
        two.destroy()
        assert dist.get_rank(torch_group) == rank - 1  # the caller's group is left alone
    alone = [dist.new_group([r]) for r in range(3)][rank]
    assert isinstance(alone, dist.ProcessGroup)
    single = GroupCoordinator.from_process_group(alone)
    assert (single.world_size, single.rank, single.device_group) == (1, rank, None)
    listed = single.all_gather(torch.ones(2), 0, True)
    assert isinstance(listed, list)
    same(listed[0], torch.ones(2))


def test_a_coordinator_wraps_a_torch_group_and_leaves_it_alone(ranks: RankPool):
    ranks.run(from_groups, world_size=3)


def from_mesh() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("ring", "ulysses", "tp"))
    ring = GroupCoordinator.from_device_mesh(mesh, "ring")
    ulysses = GroupCoordinator.from_device_mesh(mesh, 1, name="u")
    tp = GroupCoordinator.from_device_mesh(mesh, "tp", debug=True)
    assert (ring.name, ring.ranks) == ("mesh ring", [rank % 2, rank % 2 + 2])
    assert (ulysses.name, ulysses.ranks) == ("u", [rank // 2 * 2, rank // 2 * 2 + 1])
    assert (tp.world_size, tp.checked) == (1, None)
    works(ring)
    works(ulysses)


def test_a_coordinator_wraps_a_dimension_of_a_device_mesh(ranks: RankPool):
    ranks.run(from_mesh, world_size=4)


def outside_the_mesh() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    if dist.get_rank() == 2:
        message = raised(lambda: GroupCoordinator.from_device_mesh(mesh, "sp"), ParallelConfigError)
        assert "rank 2 is not in the mesh" in message


@pytest.mark.filterwarnings("ignore")  # torch's own, about a mesh smaller than the world
def test_a_rank_outside_the_mesh_is_told_so(ranks: RankPool):
    ranks.run(outside_the_mesh, world_size=3)


def neighbours() -> None:
    rank = dist.get_rank()
    lists = [[0, 4, 5], [1], [2, 3]]
    group = GroupCoordinator(lists, rank, "gloo")
    mine = next(ranks for ranks in lists if rank in ranks)
    size, place = len(mine), mine.index(rank)
    assert (group.group_next_rank, group.group_prev_rank) == (
        (place + 1) % size,
        (place - 1) % size,
    )
    assert (group.next_rank, group.prev_rank) == (mine[(place + 1) % size], mine[place - 1])
    assert (group.group_skip_rank, group.skip_rank) == (size - 1 - place, mine[size - 1 - place])
    assert (group.checked is None) == (rank == 1)


def test_neighbours_wrap_round_and_the_mirror_rank_is_counted_from_the_end(ranks: RankPool):
    ranks.run(neighbours, world_size=6)


def test_without_a_process_group_a_group_of_one_rank_is_the_identity():
    assert not dist.is_initialized()
    alone = GroupCoordinator([[7]], 2, "gloo")
    assert (alone.rank, alone.ranks, alone.local_rank) == (7, [7], 2)
    assert (alone.next_rank, alone.prev_rank, alone.skip_rank) == (7, 7, 7)
    assert (alone.device_group, alone.cpu_group, alone.checked) == (None, None, None)
    mine = seeded(1, 4, 3)
    with record_traffic() as traffic:
        for result in (
            alone.all_reduce(mine),
            alone.all_gather(mine),
            alone.gather(mine),
            alone.reduce_scatter(mine),
            alone.all_to_all(mine, 0, 1),
            alone.broadcast(mine),
        ):
            assert result is mine
        listed = alone.all_gather(mine, 1, separate_tensors=True)
        assert isinstance(listed, list)
        assert len(listed) == 1
        assert listed[0] is mine
        thing = [1, "two"]
        assert alone.broadcast_object(thing) is thing
        assert alone.broadcast_object_list([thing]) == [thing]
        held = {"a": mine}
        assert alone.broadcast_tensor_dict(held) is held
        alone.barrier()
    assert traffic.total_calls == 0
    alone.destroy()
    alone.destroy()
    assert alone.all_reduce(mine) is mine


ALONE_REFUSED: dict[str, tuple[Callable[[GroupCoordinator, Tensor], object], type[Exception]]] = {
    "dim": (lambda g, x: g.all_gather(x, 7), ParallelConfigError),
    "lengths": (lambda g, x: g.all_gather(x, lengths=[99]), ParallelConfigError),
    "dst": (lambda g, x: g.gather(x, 5), ParallelConfigError),
    "gather": (lambda g, x: g.gather(x, 0, 2), ParallelConfigError),
    "src": (lambda g, x: g.broadcast(x, 3), ParallelConfigError),
    "no number": (lambda g, x: g.broadcast(x, "0"), ParallelConfigError),  # type: ignore[arg-type]
    "reduce_scatter": (lambda g, x: g.reduce_scatter(x, 9), ParallelConfigError),
    "all_to_all": (lambda g, x: g.all_to_all(x, 0, 0), ParallelConfigError),
    "all_to_all_4D": (
        lambda g, x: all_to_all_4D(x.reshape(1, 1, 4, 3), group=g, head_counts=[9]),
        ParallelConfigError,
    ),
    "halo": (lambda g, x: halo_exchange(x, 0, 1, 1, g, [9]), ParallelConfigError),
    "dtype": (lambda g, x: g.all_reduce(x.to(torch.float8_e5m2)), ParallelConfigError),
    "sparse": (lambda g, x: g.all_gather(x.to_sparse()), ParallelConfigError),
    "object": (lambda g, x: g.broadcast_object(object()), TypeError),
    "object root": (lambda g, x: g.broadcast_object(1, 1), ParallelConfigError),
    "list": (lambda g, x: g.broadcast_object_list([object()]), TypeError),
    "dict": (lambda g, x: g.broadcast_tensor_dict({"a": object()}), TypeError),
    "dict root": (lambda g, x: g.broadcast_tensor_dict({"a": x}, 1), ParallelConfigError),
    "send dict": (lambda g, x: g.send_tensor_dict({"a": object()}), TypeError),
}


@pytest.mark.parametrize("name", ALONE_REFUSED)
def test_a_group_of_one_rank_refuses_what_a_larger_one_refuses(name: str):
    call, kind = ALONE_REFUSED[name]
    raised(lambda: call(GroupCoordinator([[0]], 0, "gloo"), seeded(1, 4, 3)), kind)


def outsiders() -> str:
    torch_group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        wrap = GroupCoordinator.from_process_group
        return raised(lambda: wrap(torch_group), ParallelConfigError)
    return ""


def test_a_group_that_this_rank_is_not_in_is_not_wrapped(ranks: RankPool):
    assert "wrap a group on its own ranks only" in ranks.run(outsiders, world_size=3)[2]


def mesh_with_everything() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    beside = dist.new_group([0, 1])
    assert isinstance(beside, dist.ProcessGroup)
    where = torch.device("meta")
    group = GroupCoordinator.from_device_mesh(
        mesh, "sp", cpu_group=beside, timeout=TIMEOUT, device=where
    )
    assert group.checked is not None
    assert (group.cpu_group, group.checked.timeout, group.device) == (beside, TIMEOUT, where)


def test_a_dimension_of_a_mesh_takes_a_cpu_group_a_timeout_and_a_device(ranks: RankPool):
    ranks.run(mesh_with_everything)


@pytest.mark.parametrize("timeout", [5, timedelta(0), timedelta(seconds=-1)])
def test_a_timeout_is_a_positive_timedelta(timeout: object):
    with pytest.raises(ParallelConfigError, match=r"is no positive datetime\.timedelta"):
        ProcessGroupPool("gloo", timeout=timeout)  # type: ignore[arg-type]


def names_of_groups() -> tuple[str, str, str]:
    group = everyone()
    assert group.device_group is not None
    plain = CheckedGroup.of(dist.group.WORLD)
    return group.device_group.group_desc, plain.name, CheckedGroup.of(group.device_group).name


def test_groups_carry_their_name_in_torch_and_are_called_by_it(ranks: RankPool):
    described, plain, ours = ranks.run(names_of_groups)[0]
    assert described == ours == "omni/all"
    assert plain != "undefined"


def test_several_ranks_without_a_process_group_are_an_error_with_the_remedy():
    with pytest.raises(ParallelError, match=r"torch\.distributed\.init_process_group"):
        GroupCoordinator([[0, 1]], 0, "gloo")


def only_the_outsider() -> str:
    if dist.get_rank() != 1:
        return ""
    return raised(lambda: GroupCoordinator([[0]], 0, "gloo", name="tp"), ParallelConfigError)


def test_a_rank_in_none_of_the_lists_is_told_what_to_add(ranks: RankPool):
    message = ranks.run(only_the_outsider)[1]
    assert "rank 1 is in none of the groups [[0]] of 'tp'" in message
    assert "add [1] for a rank that stands alone" in message


def destroyed() -> None:
    group = everyone()
    ring = group.device_group
    assert ring is not None
    group.destroy()
    group.destroy()
    for call in (
        lambda: group.all_reduce(seeded(1, 2)),
        lambda: group.all_gather(seeded(1, 2)),
        lambda: group.send(seeded(1, 2)),
        group.recv_tensor_dict,
        lambda: group.broadcast_object(1),
        group.barrier,
    ):
        message = raised(call, ParallelError)
        assert "group 'all' of ranks [0, 1] was destroyed; build a new one" in message
    assert (group.device_group, group.cpu_group) == (None, None)
    raised(lambda: dist.get_rank(ring), ValueError)


def test_a_destroyed_group_raises_and_does_not_turn_into_the_identity(ranks: RankPool):
    ranks.run(destroyed)


def shared_pool() -> None:
    rank = dist.get_rank()
    pool = ProcessGroupPool("gloo", timeout=TIMEOUT)
    one = GroupCoordinator([[0, 1], [2, 3]], rank, "gloo", name="sp", pool=pool)
    two = GroupCoordinator([[0, 1], [2, 3]], rank, "gloo", name="ulysses", pool=pool)
    assert one.device_group is two.device_group
    one.destroy()
    works(two)  # the pool owns the group
    pool.destroy()


def test_coordinators_over_the_same_ranks_share_the_groups_of_a_pool(ranks: RankPool):
    ranks.run(shared_pool, world_size=4)


def test_the_device_is_the_cpu_for_gloo_and_else_that_of_the_local_rank(
    monkeypatch: pytest.MonkeyPatch,
):
    from omni_group_coordinator import membership

    monkeypatch.setattr(membership, "get_local_device", lambda rank: torch.device("cuda", rank))
    assert GroupCoordinator([[0]], 3, "gloo").device == torch.device("cpu")
    assert GroupCoordinator([[0]], 3, "nccl").device == torch.device("cuda", 3)
    given = torch.device("cuda", 6)
    assert GroupCoordinator([[0]], 3, "nccl", device=given).device == given
