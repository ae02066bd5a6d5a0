"""Rows are split evenly, over no more ranks than can have enough of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_vae_patch.spatial.exact_vae import side_of_fast_kernels
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, Partition, best_partition, partition

lengths = st.integers(1, 200)
ranks_ = st.integers(1, 16)
leasts = st.integers(1, 9)
sides = st.sampled_from([HEIGHT, WIDTH])


@settings(deadline=None)
@given(lengths, ranks_, sides, leasts)
def test_rows_are_all_given_out_evenly_and_the_first_ranks_have_them(length, ranks, dim, least):
    found = partition(length, ranks, dim, least)
    assert found.dim == dim
    assert len(found.rows) == ranks
    assert sum(found.rows) == found.total == length
    assert all(found.rows[: found.active])
    assert not any(found.rows[found.active :])
    assert max(found.rows) - min(found.rows[: found.active]) <= 1


@settings(deadline=None)
@given(lengths, ranks_, leasts)
def test_as_many_ranks_work_as_can_have_the_least_rows(length, ranks, least):
    found = partition(length, ranks, HEIGHT, least)
    assert found.active == 1 or min(found.rows[: found.active]) >= least
    assert found.active == ranks or (found.active + 1) * least > length


@settings(deadline=None)
@given(lengths, ranks_, st.integers(1, 16))
def test_starts_and_finer_maps_follow_the_rows(length, ranks, factor):
    found = partition(length, ranks, HEIGHT)
    starts = [found.start(rank) for rank in range(ranks)]
    assert starts[0] == 0
    following = [*starts[1:], length]
    assert [b - a for a, b in zip(starts, following, strict=True)] == list(found.rows)
    assert sum(found.at(factor)) == length * factor
    assert found.at(1) == list(found.rows)


@settings(deadline=None)
@given(lengths, lengths, ranks_, leasts)
def test_the_best_side_leaves_the_busiest_rank_the_smallest_share(height, width, ranks, least):
    found = best_partition(height, width, ranks, (HEIGHT, WIDTH), least)
    for dim, length in ((HEIGHT, height), (WIDTH, width)):
        other = partition(length, ranks, dim, least)
        assert max(found.rows) / found.total <= max(other.rows) / other.total
        assert best_partition(height, width, ranks, (dim,), least) == other


@pytest.mark.parametrize(
    ("height", "width", "ranks", "expected"),
    [
        (60, 104, 4, Partition(WIDTH, (26, 26, 26, 26))),  # as good, and the halo is shorter
        (104, 60, 4, Partition(HEIGHT, (26, 26, 26, 26))),
        (60, 90, 4, Partition(HEIGHT, (15, 15, 15, 15))),  # 23 of 90 columns would be more
        (2, 3, 4, Partition(WIDTH, (1, 1, 1, 0))),
        (1, 1, 3, Partition(HEIGHT, (1, 0, 0))),
    ],
)
def test_examples_of_sizes(height, width, ranks, expected):
    assert best_partition(height, width, ranks, (HEIGHT, WIDTH)) == expected


def test_of_sides_that_divide_as_well_the_favoured_one_is_taken() -> None:
    assert best_partition(32, 32, 2, (HEIGHT, WIDTH), favoured=WIDTH).dim == WIDTH
    assert best_partition(64, 32, 2, (HEIGHT, WIDTH), favoured=WIDTH).dim == WIDTH
    assert best_partition(32, 31, 2, (HEIGHT, WIDTH), favoured=WIDTH).dim == HEIGHT
    assert best_partition(32, 32, 2, (HEIGHT,), favoured=WIDTH).dim == HEIGHT


def test_videos_on_cpus_keep_their_height() -> None:
    assert side_of_fast_kernels(torch.rand(1, 4, 3, 8, 8)) == WIDTH
    assert side_of_fast_kernels(torch.rand(1, 4, 8, 8)) is None
    assert side_of_fast_kernels(torch.rand(1, 4, 3, 8, 8, device="meta")) is None
