"""The layout of a world of ranks as a value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import product
from math import prod
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_parallel_state import Dim, ParallelConfigError, ParallelLayout

GRID = ("dp", "cfg", "pp", "ring", "ulysses", "tp")


class Place(NamedTuple):
    """A rank and where it is, made from the formula and from nothing of the package."""

    rank: int
    dp: int
    cfg: int
    pp: int
    ring: int
    ulysses: int
    tp: int
    sp: int


def places(dp: int, cfg: int, pp: int, ring: int, ulysses: int, tp: int) -> list[Place]:
    """Every rank, by rank = tp + TP*(sp + SP*(pp + PP*(cfg + CFG*dp))), sp = ring*U + ulysses."""
    found = []
    for d, c, p, r, u, t in product(*map(range, (dp, cfg, pp, ring, ulysses, tp))):
        s = r * ulysses + u
        rank = t + tp * (s + ring * ulysses * (p + pp * (c + cfg * d)))
        found.append(Place(rank, d, c, p, r, u, t, s))
    return found


def brute_force(found: list[Place], inside: set[str]) -> set[tuple[int, ...]]:
    """Ranks that agree in every dimension that is not inside."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in found:
        key = tuple(getattr(place, name) for name in GRID if name not in inside)
        groups.setdefault(key, []).append(place.rank)
    return {tuple(sorted(group)) for group in groups.values()}


def degrees_up_to(limit: int) -> list[tuple[int, ...]]:
    """Every choice of six degrees whose product is at most the limit."""
    found: list[tuple[int, ...]] = [()]
    for _ in GRID:
        found = [(*head, degree) for head in found for degree in range(1, limit // prod(head) + 1)]
    return found


DIMS = {name: {name} for name in GRID} | {"sp": {"ring", "ulysses"}, "tp-dp": {"tp", "dp"}}


@pytest.mark.parametrize("world_size", range(1, 17))
def test_groups_are_those_of_the_formula_for_every_choice_of_degrees(world_size: int) -> None:
    for degrees in degrees_up_to(16):
        if prod(degrees) != world_size:
            continue
        layout, found = ParallelLayout(*degrees), places(*degrees)
        for dim, inside in DIMS.items():
            assert set(layout.groups(dim)) == brute_force(found, inside), (degrees, dim)


@pytest.mark.parametrize("world_size", range(1, 17))
def test_ulysses_and_ring_groups_lie_inside_the_sp_group_and_partition_it(world_size: int) -> None:
    for degrees in degrees_up_to(16):
        if prod(degrees) != world_size:
            continue
        layout = ParallelLayout(*degrees)
        for group in layout.groups("sp"):
            for dim in ("ulysses", "ring"):
                parts = [part for part in layout.groups(dim) if set(part) & set(group)]
                assert sorted(rank for part in parts for rank in part) == list(group), degrees
            # Ulysses is inner: its peers are neighbours in the sequence
            runs = [layout.group_of(rank, "ulysses") for rank in group[:: layout.ulysses]]
            assert tuple(rank for run in runs for rank in run) == group, degrees


def test_the_order_says_which_dimension_is_fastest() -> None:
    layout = ParallelLayout(tp=2, ring=2, ulysses=2, cfg=2, order="cfg-sp-tp")

    assert layout.order == "cfg-sp-tp-pp-dp"
    assert layout.group_of(0, "cfg") == (0, 1)
    assert layout.group_of(0, "ulysses") == (0, 2)
    assert layout.group_of(0, "ring") == (0, 4)
    assert layout.group_of(0, "tp") == (0, 8)
    assert layout.rank_at(cfg=1, sp=2, tp=1) == 1 + 2 * 2 + 8


PROPERTY = settings(deadline=None, max_examples=60)  # a busy machine has no steady clock

LAYOUTS = st.builds(
    ParallelLayout,
    *[st.sampled_from([1, 1, 2, 3])] * 6,
    order=st.permutations(["tp", "sp", "pp", "cfg", "dp"]).map("-".join),
)


@PROPERTY
@given(LAYOUTS)
def test_every_dimension_partitions_the_world_in_any_order(layout: ParallelLayout) -> None:
    for dim in Dim:
        groups = layout.groups(dim)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {layout.degree(dim)}
        assert all(list(group) == sorted(group) for group in groups)


@PROPERTY
@given(LAYOUTS)
def test_coordinates_and_rank_at_are_inverse(layout: ParallelLayout) -> None:
    seen = set()
    groups = {dim: set(layout.groups(dim)) for dim in Dim}
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        seen.add(tuple(at[name] for name in GRID))
        assert (
            layout.rank_at(**{name: at[name] for name in ("dp", "cfg", "pp", "sp", "tp")}) == rank
        )
        parts = ("dp", "cfg", "pp", "ring", "ulysses", "tp")
        assert layout.rank_at(**{name: at[name] for name in parts}) == rank
        assert at["sp"] == at["ring"] * layout.ulysses + at["ulysses"]
        for dim in Dim:
            assert layout.group_of(rank, dim)[at[dim]] == rank
            assert layout.group_of(rank, dim) in groups[dim]
    assert len(seen) == layout.world_size


@PROPERTY
@given(LAYOUTS)
def test_sequence_positions_are_a_permutation_in_each_sp_group(layout: ParallelLayout) -> None:
    for group in layout.groups("sp"):
        assert [layout.sequence_position(rank) for rank in group] == list(range(layout.sp))


@PROPERTY
@given(LAYOUTS, st.lists(st.sampled_from(GRID), min_size=1, unique=True))
def test_a_grid_holds_each_rank_at_its_coordinates(layout: ParallelLayout, dims: list[str]) -> None:
    rank = layout.world_size // 2
    fixed = [name for name in GRID if name not in dims]
    grid = layout.grid_of(rank, dims)
    for peer, index in zip(grid, product(*(range(layout.degree(d)) for d in dims)), strict=True):
        at = layout.coordinates(peer)
        assert tuple(at[name] for name in dims) == index
        assert [at[name] for name in fixed] == [layout.coordinates(rank)[name] for name in fixed]


def test_hsdp_groups_are_runs_and_strides_over_the_other_dimensions() -> None:
    layout = ParallelLayout(cfg=2, ulysses=4, fs=2, replicate=2)

    assert layout.world_size == 8
    assert layout.groups("fs") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("shard") == layout.groups("fs")
    assert layout.groups("replicate") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.grid_of(5, ("replicate", "shard")) == (4, 5, 6, 7)


def test_hsdp_alone_is_a_world_of_shards_times_replicas() -> None:
    layout = ParallelLayout(fs=4, replicate=2)

    assert (layout.world_size, layout.dp) == (8, 8)
    assert layout.groups("replicate") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert ParallelLayout(fs=2, vae=3).world_size == 6


def test_vae_groups_are_runs_over_the_other_dimensions() -> None:
    layout = ParallelLayout(cfg=2, ulysses=2, vae=4)

    assert layout.groups("vae") == ((0, 1, 2, 3),)
    assert ParallelLayout(cfg=2, ulysses=3, vae=2).groups("vae") == ((0, 1), (2, 3), (4, 5))
    assert layout.groups("dit") == layout.groups("world") == ((0, 1, 2, 3),)


def test_weights_may_be_sharded_within_a_pipeline_stage() -> None:
    layout = ParallelLayout(pp=2, ulysses=2, fs=2)

    assert layout.groups("fs") == ((0, 1), (2, 3))


def test_for_world_infers_the_replicas() -> None:
    assert ParallelLayout.for_world(8, cfg=2, ulysses=2).dp == 2
    assert ParallelLayout.for_world(8, dp=1, fs=4, replicate=2).dp == 8
    assert ParallelLayout.for_world(8, fs=4).groups("replicate") == tuple((r,) for r in range(8))


def test_a_layout_is_a_value() -> None:
    layout = ParallelLayout(cfg=2)
    assert layout == ParallelLayout(cfg=2, order="tp-sp-pp-cfg-dp")
    assert hash(layout) == hash(ParallelLayout(1, 2))
    with pytest.raises(FrozenInstanceError):
        layout.cfg = 3  # type: ignore[misc]


def test_describe_names_every_dimension_with_its_first_group() -> None:
    text = ParallelLayout(ring=2, ulysses=2, tp=4).describe()

    assert text.startswith("16 ranks: ring=2 * ulysses=2 * tp=4 = 16; order tp-sp-pp-cfg-dp")
    assert "ring      degree    2,    8 groups, first: 0, 8" in text
    assert "first: 0, 1, 2, 3, 4, 5, 6, 7, …" in text
    assert ParallelLayout().describe().startswith("1 rank: ")


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"cfg": 0}, "cfg=0 .* nearest legal value is cfg=1"),
        ({"vae": -1}, "vae=-1 .* nearest legal value is vae=1"),
        ({"ring": "2"}, "ring='2' is a str"),
        ({"ulysses": 6, "fs": 4}, "fs=4 does not divide the world of 6 ranks; .*: 1, 2, 3, 6"),
        ({"ulysses": 6, "vae": 4}, "vae=4 does not divide the 6 ranks; .*: 1, 2, 3, 6"),
        (
            {"ulysses": 8, "fs": 4, "replicate": 4},
            "fs=4 [*] replicate=4 = 16 does not divide the world of 8 ranks; nearest legal fs with "
            "replicate=4: 1, 2; replicate with fs=4: 1, 2",
        ),
        ({"tp": 2, "ulysses": 2, "fs": 2}, "peers of tp, whose weights differ; .*: 1$"),
        ({"tp": 2, "pp": 2, "fs": 4}, "peers of tp and pp, whose weights differ"),
        (
            {"pp": 2, "ulysses": 4, "fs": 8},
            "fs=8 would shard weights over peers of pp, .* legal fs with replicate=1: 1, 2, 4",
        ),
        (
            {"dp": 8, "fs": 3, "replicate": 3},
            "= 9 does not divide the world of 8 ranks; nearest legal fs=2 [*] replicate=2 or "
            "fs=2 [*] replicate=4 or fs=4 [*] replicate=2$",
        ),
        (
            {"dp": 4, "tp": 2, "fs": 2, "replicate": 3},
            "= 6 does not divide the world of 8 ranks; nearest legal fs=1 [*] replicate=1$",
        ),
        ({"order": "tp-xx"}, "unknown dimension 'xx'"),
        ({"ring": 2, "order": "tp-pp"}, "leaves out sp, which has 2 ranks"),
    ],
)
def test_impossible_degrees_name_the_nearest_legal_ones(
    degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        ParallelLayout(**degrees)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("world_size", "degrees", "message"),
    [
        (
            6,
            {"cfg": 2, "ulysses": 2},
            "cfg=2 [*] ulysses=2 = 4 does not divide the world of 6 ranks; nearest legal: "
            "cfg: 1, 3; ulysses: 1, 3; or a world of 4 or 8 ranks",
        ),
        (7, {"cfg": 2}, "nearest legal: cfg: 1, 7; or a world of 6 or 8 ranks"),
        (
            2,
            {"cfg": 3, "tp": 3},
            "nearest legal: cfg=1 [*] tp=2 or cfg=2 [*] tp=1; or a world of 9 ranks",
        ),
        (4, {"cfg": 3, "ulysses": 3}, "legal: cfg=2 [*] ulysses=2; or a world of 9 ranks"),
        (8, {"cfg": 2, "ulysses": 5, "tp": 3}, "legal: cfg=2 [*] ulysses=4 [*] tp=1; or a world"),
        (
            8,
            {"dp": 1, "ulysses": 3, "ring": 3},
            "legal: dp=1 [*] ring=2 [*] ulysses=4 or dp=1 [*] ring=4 [*] ulysses=2; or a world",
        ),
        (8, {"fs": 5, "replicate": 3}, "nearest legal fs=4 [*] replicate=2$"),
        (
            8,
            {"dp": 1, "fs": 4, "vae": 6},
            "fs=4 with vae=6 lays out 12 ranks, but the world has 8; nearest legal: vae: 8; or a "
            "world of 12 ranks",
        ),
        (4, {"dp": 1}, "lays out 1 rank, but the world has 4; nearest legal: dp: 4"),
        (8, {"dp": 1, "ulysses": 3}, "lays out 3 ranks, but .* 8; nearest legal: ulysses: 8"),
        (8, {"dp": 1, "fs": 3}, "fs=3 lays out 3 ranks, but the world has 8; nearest legal: fs: 8"),
        (1, {"fs": 2}, "fs=2 lays out 2 ranks, but the world has 1; nearest legal: fs: 1"),
        (0, {}, "world_size=0"),
        (4, {"cfg": 0}, "cfg=0"),
        (4, {"dp": 0}, "dp=0"),
    ],
)
def test_degrees_that_do_not_fit_the_world_name_the_nearest_that_do(
    world_size: int, degrees: dict[str, int], message: str
) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        ParallelLayout.for_world(world_size, **degrees)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        ("ep", "unknown dimension 'ep'; legal: dp, cfg, pp, sp, ring, ulysses, tp, fs, "),
        ("tp-tp", "a dimension twice"),
        ("sp-ulysses", "counts ulysses twice"),
        ("sp-fs", "mixes dimensions that cut the world differently; legal together: dp, "),
    ],
)
def test_dimensions_that_do_not_exist_or_go_together_are_refused(dim: str, message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        ParallelLayout(ulysses=2).groups(dim)


def test_ranks_and_coordinates_outside_the_layout_are_refused() -> None:
    layout = ParallelLayout(ulysses=2)
    for rank in (-1, 2):
        with pytest.raises(ParallelConfigError, match="legal here: 0 to 1"):
            layout.coordinates(rank)
        with pytest.raises(ParallelConfigError, match="legal here: 0 to 1"):
            layout.group_of(rank, "sp")
    with pytest.raises(ParallelConfigError, match="sp=2 is no coordinate here; legal sp: 0 to 1"):
        layout.rank_at(sp=2)


def test_sp_is_given_by_its_two_parts() -> None:
    with pytest.raises(
        ParallelConfigError, match=r"sp=2 is ring . ulysses; pass ring= and ulysses="
    ):
        ParallelLayout.for_world(8, sp=2)  # type: ignore[call-arg]
    with pytest.raises(ParallelConfigError, match="either sp, or ring and ulysses"):
        ParallelLayout(ring=2, ulysses=2).rank_at(sp=1, ring=1)
