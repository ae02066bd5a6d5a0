import pytest
import torch
import torch.distributed as dist
from group_cases import TIMEOUT, raised, same, seeded

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    SequenceParallelGroupCoordinator,
    all_to_all_4D,
    ring_shift,
)
from rank_harness import RankPool


def build(
    sp: list[list[int]], ulysses: list[list[int]] | None, ring: list[list[int]] | None
) -> SequenceParallelGroupCoordinator:
    rank = dist.get_rank()
    groups = [
        None if lists is None else GroupCoordinator(lists, rank, "gloo", timeout=TIMEOUT)
        for lists in (ulysses, ring)
    ]
    return SequenceParallelGroupCoordinator(
        sp, rank, "gloo", ulysses_group=groups[0], ring_group=groups[1], timeout=TIMEOUT
    )


def hybrid() -> None:
    rank = dist.get_rank()
    sp = build([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]])
    assert sp.name == "sp"
    assert (sp.ulysses_world_size, sp.ulysses_rank) == (2, rank % 2)
    assert (sp.ring_world_size, sp.ring_rank) == (2, rank // 2)
    assert sp.rank_in_group == sp.ring_rank * sp.ulysses_world_size + sp.ulysses_rank
    whole = seeded(1, 1, 8, 4, 2)
    shard = whole.chunk(4, 1)[rank]
    same(all_to_all_4D(shard, group=sp.ulysses), whole.chunk(2, 1)[rank // 2].chunk(2, 2)[rank % 2])
    same(ring_shift(shard, sp.ring_group), whole.chunk(4, 1)[(rank + 2) % 4])
    same(sp.all_gather(shard, 1), whole)
    assert sp.ulysses_group is not None
    assert dist.get_process_group_ranks(sp.ulysses_group) == [rank // 2 * 2, rank // 2 * 2 + 1]
    sp.destroy()


def test_a_sequence_parallel_group_knows_its_place_in_both_sub_groups(ranks: RankPool):
    ranks.run(hybrid, world_size=4)


def one_dimension() -> None:
    rank = dist.get_rank()
    ulysses = build([[0, 1]], [[0, 1]], None)
    assert (ulysses.ulysses_world_size, ulysses.ring_world_size) == (2, 1)
    assert (ulysses.ulysses_rank, ulysses.ring_rank, ulysses.ring_group) == (rank, 0, None)
    ring = build([[0, 1]], None, [[0, 1]])
    assert (ring.ring_rank, ring.ulysses_rank, ring.ulysses_group) == (rank, 0, None)


def test_one_of_the_two_sub_groups_may_be_of_one_rank(ranks: RankPool):
    ranks.run(one_dimension)


def strided() -> None:
    """With tensor parallelism inside, the ranks of the group are every second one."""
    rank = dist.get_rank()
    world = dist.new_group([0, 2, 4, 6]), dist.new_group([1, 3, 5, 7])
    torch_group = world[rank % 2]
    assert isinstance(torch_group, dist.ProcessGroup)
    sp = SequenceParallelGroupCoordinator(
        [[0, 2, 4, 6], [1, 3, 5, 7]], rank, "gloo", ulysses_group=torch_group
    )
    assert (sp.ulysses_rank, sp.ulysses_group) == (rank // 2, torch_group)
    same(sp.ulysses.all_gather(torch.tensor([rank])), torch.tensor(sp.ranks))  # type: ignore[union-attr]


def test_ranks_need_not_be_contiguous_and_a_torch_group_will_do(ranks: RankPool):
    ranks.run(strided, world_size=8)


WRONG = {
    "missing": (None, None),
    "too small": ([[0, 1], [2, 3]], None),
    "swapped": ([[0, 2], [1, 3]], [[0, 1], [2, 3]]),
    "not crossing": ([[0, 1], [2, 3]], [[0, 1], [2, 3]]),
    "outside": ([[0, 1], [2, 3]], [[0, 3], [1, 2]]),
}


def refuse(ulysses: list[list[int]] | None, ring: list[list[int]] | None) -> tuple[str, int]:
    before = len(dist.distributed_c10d._world.pg_map)
    kept: list[GroupCoordinator] = []
    message = raised(lambda: kept.append(build([[0, 1, 2, 3]], ulysses, ring)), ParallelConfigError)
    made = sum(lists is not None for lists in (ulysses, ring))
    return message, len(dist.distributed_c10d._world.pg_map) - before - made


@pytest.mark.parametrize("case", WRONG)
def test_sub_groups_that_do_not_divide_the_group_are_refused_and_nothing_is_left(
    ranks: RankPool, case: str
):
    for message, left in ranks.run(refuse, *WRONG[case], world_size=4):
        assert "do not divide it; a Ulysses group is a contiguous run" in message
        assert "the sizes multiply to 4" in message
        assert left == 0


def three_in_twos() -> None:
    lists = ([[0, 1, 2], [3]], [[0, 1], [2], [3]], [[0, 2], [1], [3]])
    if dist.get_rank() < 3:
        raised(lambda: build(*lists), ParallelConfigError)
    else:
        build(*lists)


def test_sub_groups_that_do_not_multiply_to_the_group_are_refused_on_each_of_its_ranks(
    ranks: RankPool,
):
    ranks.run(three_in_twos, world_size=4)


def test_a_group_of_one_rank_needs_no_sub_groups_and_no_process_group():
    assert not dist.is_initialized()
    sp = SequenceParallelGroupCoordinator([[0]], 0, "gloo")
    assert (sp.ulysses_world_size, sp.ring_world_size) == (1, 1)
    assert (sp.ulysses_group, sp.ring_group) == (None, None)
    mine = seeded(1, 3)
    assert sp.all_gather(mine) is mine


def wrap_a_torch_group() -> None:
    world = dist.group.WORLD
    assert world is not None
    sp = SequenceParallelGroupCoordinator.from_process_group(world, name="sp")
    assert (sp.ulysses_world_size, sp.ulysses_rank) == (3, dist.get_rank())
    assert (sp.ring_world_size, sp.ring_rank, sp.ring_group) == (1, 0, None)
    assert sp.ulysses_group is world


def test_a_wrapped_torch_group_is_one_ulysses_group(ranks: RankPool):
    ranks.run(wrap_a_torch_group, world_size=3)
