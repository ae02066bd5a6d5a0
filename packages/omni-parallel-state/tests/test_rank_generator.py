"""Groups of ranks by arithmetic, under the names that diffusion code knows."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_parallel_state import (
    ParallelConfigError,
    RankGenerator,
    generate_masked_orthogonal_rank_groups,
)

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def test_groups_of_the_16_rank_example_are_those_of_the_definition() -> None:
    ranks = RankGenerator(tp=1, sp=2, pp=2, cfg=2, dp=2)

    assert ranks.get_ranks("sp") == [[rank, rank + 1] for rank in range(0, 16, 2)]
    assert sorted(ranks.get_ranks("pp"))[:4] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert ranks.get_ranks("cfg")[:5] == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12]]
    assert ranks.get_ranks("dp") == [[rank, rank + 8] for rank in range(8)]
    assert ranks.get_ranks("tp") == [[rank] for rank in range(16)]


def test_sp_ranks_are_strided_by_tp() -> None:
    assert RankGenerator(tp=2, sp=4, pp=1, cfg=1, dp=1).get_ranks("sp") == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]


@settings(deadline=None)
@given(sizes=SIZES, data=st.data())
def test_a_group_holds_the_ranks_that_agree_in_every_unmasked_index(
    sizes: list[int], data: st.DataObject
) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    expected: dict[tuple[int, ...], list[int]] = {}
    # product() runs its last factor fastest, the sizes have their fastest first
    for rank, index in enumerate(product(*(range(size) for size in reversed(sizes)))):
        fixed = tuple(i for i, inside in zip(reversed(index), mask, strict=True) if not inside)
        expected.setdefault(fixed, []).append(rank)
    world_size = sum(map(len, expected.values()))

    groups = generate_masked_orthogonal_rank_groups(world_size, sizes, mask)

    assert groups == sorted(expected.values())


def test_the_order_string_says_which_dimension_is_fastest() -> None:
    ranks = RankGenerator(tp=2, sp=2, pp=1, cfg=1, dp=1, order="sp-tp")

    assert ranks.get_ranks("sp") == [[0, 1], [2, 3]]
    assert ranks.get_ranks("tp") == [[0, 2], [1, 3]]


def test_several_dimensions_make_one_group() -> None:
    ranks = RankGenerator(tp=2, sp=2, pp=2, cfg=1, dp=1)

    assert ranks.get_ranks("tp-pp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert ranks.get_mask(ranks.order, "tp-pp") == [True, False, True, False, False]


def test_fs_groups_are_runs_of_consecutive_ranks_over_the_other_dimensions() -> None:
    ranks = RankGenerator(tp=1, sp=4, pp=1, cfg=2, dp=1, fs=2)

    assert ranks.get_ranks("fs") == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_independent_ranks_are_consecutive_whatever_the_order() -> None:
    ranks = RankGenerator(tp=2, sp=2, pp=1, cfg=2, dp=1)

    assert ranks.get_ranks("sp-cfg", independent_ranks=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_offset_is_added_to_every_rank() -> None:
    assert RankGenerator(1, 2, 1, 2, 1, rank_offset=8).get_ranks("cfg") == [[8, 10], [9, 11]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 0}, "tp=0 .* nearest legal value is tp=1"),
        ({"pp": -2}, "pp=-2 .* nearest legal value is pp=1"),
        ({"sp": 2.0}, "sp=2.0 is a float"),
        ({"cfg": True}, "cfg=True is a bool"),
        ({"sp": 6, "fs": 4}, "fs=4 does not divide the 6 ranks; nearest legal fs: 1, 2, 3, 6"),
        ({"rank_offset": -1}, "rank_offset=-1 .* nearest legal value is 0"),
        ({"order": "tp-sq"}, "unknown dimension 'sq'; legal: tp, sp, pp, cfg, dp"),
        ({"order": "tp-sp-tp"}, "a dimension twice"),
        ({"order": ""}, "unknown dimension ''"),
        ({"cfg": 2, "order": "tp-sp"}, "leaves out cfg, which has 2 ranks; .*'tp-sp-pp-cfg-dp'"),
    ],
)
def test_impossible_arguments_name_the_nearest_legal_ones(
    arguments: dict[str, object], message: str
) -> None:
    degrees = {"tp": 1, "sp": 1, "pp": 1, "cfg": 1, "dp": 1, **arguments}
    with pytest.raises(ParallelConfigError, match=message):
        RankGenerator(**degrees)  # type: ignore[arg-type]


def test_an_unknown_token_names_the_dimensions_there_are() -> None:
    with pytest.raises(ParallelConfigError, match="'ep'; legal here: tp, sp, pp, cfg, dp, fs"):
        RankGenerator(1, 2, 1, 1, 1).get_ranks("ep")


@pytest.mark.parametrize(
    ("world_size", "sizes", "mask", "message"),
    [
        (8, [2, 2], [True, False], "multiplies to 4, but world_size=8; .* 4"),
        (4, [2, 2], [True], "mask has 1 entries for the 2 sizes"),
        (0, [0], [True], r"parallel_size\[0\]=0"),
    ],
)
def test_sizes_that_do_not_fit_the_world_or_the_mask_are_refused(
    world_size: int, sizes: list[int], mask: list[bool], message: str
) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        generate_masked_orthogonal_rank_groups(world_size, sizes, mask)
