import itertools

import pytest
import torch
import torch.distributed as dist
from group_cases import Guarded, everyone, raised, same, seeded
from hypothesis import given
from hypothesis import strategies as st

from omni_group_coordinator import (
    ParallelConfigError,
    halo_exchange,
    record_traffic,
    split_sizes,
)
from omni_group_coordinator.halo import halo_plan
from rank_harness import RankPool

shards = st.lists(st.integers(0, 6), min_size=1, max_size=8)
rows = st.integers(0, 15)


@given(lengths=shards, before=rows, after=rows, data=st.data())
def test_a_plan_names_every_missing_row_once_in_order_and_its_holder(
    lengths: list[int], before: int, after: int, data: st.DataObject
):
    rank = data.draw(st.integers(0, len(lengths) - 1))
    holder = [owner for owner, length in enumerate(lengths) for _ in range(length)]
    start = sum(lengths[:rank])
    stop = start + lengths[rank]
    expected = (range(max(0, start - before), start), range(stop, min(len(holder), stop + after)))
    for spans, wanted in zip(halo_plan(lengths, rank, before, after), expected, strict=True):
        planned = [(row, span.rank) for span in spans for row in range(span.start, span.stop)]
        if lengths[rank] == 0:
            assert planned == []
        else:
            assert planned == [(row, holder[row]) for row in wanted]


@given(lengths=shards, before=rows, after=rows)
def test_no_pair_of_ranks_exchanges_more_than_one_span_each_way(
    lengths: list[int], before: int, after: int
):
    for rank in range(len(lengths)):
        first, last = halo_plan(lengths, rank, before, after)
        peers = [span.rank for span in first + last]
        assert len(peers) == len(set(peers))
        assert rank not in peers


def exchange_halos(splits: list[list[int]]) -> None:
    group = everyone()
    rank = group.rank_in_group
    for lengths, dim in itertools.product(splits, (0, 1, -1)):
        shape = [2, 2, 3]
        shape[dim] = sum(lengths)
        whole = seeded(7, *shape)
        start = sum(lengths[:rank])
        stop = start + lengths[rank]
        mine = whole.narrow(dim, start, lengths[rank])
        for before, after in ((1, 1), (2, 0), (0, 3), (5, 4), (0, 0)):
            with record_traffic() as traffic:
                first, last = halo_exchange(mine, dim, before, after, group, lengths)
            low, high = max(0, start - before), min(sum(lengths), stop + after)
            if lengths[rank] == 0:
                low = high = start
            same(first, whole.narrow(dim, low, start - low))
            same(last, whole.narrow(dim, stop, high - stop))
            assert traffic.total_bytes == 4 * sent_elements(whole, dim, lengths, before, after)


def sent_elements(
    whole: torch.Tensor, dim: int, lengths: list[int], before: int, after: int
) -> int:
    """What the others lack of this rank's rows, row by row."""
    starts = list(itertools.accumulate(lengths, initial=0))
    mine = range(starts[dist.get_rank()], starts[dist.get_rank() + 1])
    missing = 0
    for peer, length in enumerate(lengths):
        if peer == dist.get_rank() or length == 0:
            continue
        low, high = starts[peer], starts[peer + 1]
        missing += sum(low - before <= row < low or high <= row < high + after for row in mine)
    return missing * (whole.numel() // whole.shape[dim])


@pytest.mark.parametrize(
    "splits",
    [
        [[3, 4], [1, 1], [5, 0], [0, 2]],
        [[3, 4, 2], [1, 1, 1], [2, 0, 1], [0, 0, 3], [1, 2, 0]],
        [split_sizes(9, 4), [1, 0, 0, 2], [0, 1, 1, 0], [2, 2, 2, 2]],
    ],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def test_halos_are_the_rows_of_the_whole_next_to_the_shard(
    ranks: RankPool, splits: list[list[int]]
):
    ranks.run(exchange_halos, splits, world_size=len(splits[0]))


def exchange_strided() -> None:
    group = everyone()
    rank = group.rank_in_group
    pieces = [seeded(r, 3, 4) for r in range(2)]
    mine = Guarded(pieces[rank])
    first, last = halo_exchange(mine.tensor, 1, 2, 2)
    same(first, pieces[0][:, -2:] if rank else pieces[0][:, :0])
    same(last, pieces[1][:, :0] if rank else pieces[1][:, :2])
    mine.holds(pieces[rank])


def test_halos_of_a_strided_shard_over_the_default_group(ranks: RankPool):
    ranks.run(exchange_strided)


def refuse() -> None:
    group = everyone()
    mine = seeded(1, 3, 2)
    refused = [
        (lambda: halo_exchange(mine, 2, 1, 1, group), "dim=2 does not exist"),
        (lambda: halo_exchange(mine, 0, -1, 1, group), "a halo of -1 rows before and 1 after"),
        (lambda: halo_exchange(mine, 0, 1, -2, group), "legal: 0 or more"),
        (lambda: halo_exchange(mine, 0, 1, 1, group, [2, 4]), "lengths=[2, 4] say"),
        (lambda: halo_exchange(mine, 0, 1, 1, group, [3]), "it needs 2 lengths"),
    ]
    for call, expected in refused:
        if group.rank == 0 or "[2, 4]" not in expected:
            assert expected in raised(call, ParallelConfigError)


def test_a_halo_that_cannot_be_is_refused(ranks: RankPool):
    ranks.run(refuse)
