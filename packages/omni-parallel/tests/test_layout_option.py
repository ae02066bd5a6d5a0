"""A layout is read from its short form, and what cannot be one is refused with what could."""

from __future__ import annotations

import json

import click
import pytest

from omni_parallel.demo.layout_option import MAX_RANKS, choose_layout, parse_layout
from omni_parallel.demo.layouts import (
    DEGREES,
    STRATEGIES,
    FusedLayout,
    layout_name,
    options_of,
    strategies_of,
)
from omni_parallel.demo.pipeline import MODEL
from omni_parallel.demo.request import BLOCKS
from omni_parallel_state import ParallelLayout


@pytest.mark.parametrize(
    ("text", "layout", "name", "strategies"),
    [
        ("cfg=2", ParallelLayout(cfg=2), "cfg=2", ("cfgp",)),
        ("ulysses=2", ParallelLayout(ulysses=2), "ulysses=2", ("sp",)),
        ("ring=3", ParallelLayout(ring=3), "ring=3", ("sp",)),
        (
            "cfg=2,ulysses=2",
            ParallelLayout(cfg=2, ulysses=2),
            "cfg=2, ulysses=2",
            ("sp", "cfgp"),
        ),
        (
            " ulysses = 2, ring=4 ,cfg=1",
            ParallelLayout(ring=4, ulysses=2),
            "ring=4, ulysses=2",
            ("sp",),
        ),
        ("cfg=1", ParallelLayout(), "single", ()),
        ("vae_patch=2", ParallelLayout(dp=2, vae=2), "vae_patch=2", ("vae_patch",)),
        (
            "vae_patch=2,ulysses=2,cfg=2",
            ParallelLayout(cfg=2, ulysses=2, vae=2),
            "cfg=2, ulysses=2, vae_patch=2",
            ("sp", "cfgp", "vae_patch"),
        ),
        ("hsdp=2", ParallelLayout(dp=2, fs=2), "hsdp=2", ("hsdp",)),
        (
            "ulysses=2,hsdp=2",
            ParallelLayout(ulysses=2, fs=2),
            "ulysses=2, hsdp=2",
            ("hsdp", "sp"),
        ),
        (
            "vae_patch=2,hsdp=4,ulysses=2,cfg=2",
            ParallelLayout(cfg=2, ulysses=2, fs=4, vae=2),
            "cfg=2, ulysses=2, hsdp=4, vae_patch=2",
            ("hsdp", "sp", "cfgp", "vae_patch"),
        ),
        ("pp=6", ParallelLayout(pp=6), "pp=6", ("pp",)),
        (
            "hsdp=2,ulysses=2,pp=3",
            ParallelLayout(pp=3, ulysses=2, fs=2),
            "pp=3, ulysses=2, hsdp=2",
            ("pp", "hsdp", "sp"),
        ),
        ("cfg=2,pp=2", ParallelLayout(cfg=2, pp=2), "cfg=2, pp=2", ("pp", "cfgp")),
        (
            "vae_patch=2,ulysses=2,pp=2,cfg=2,hsdp=1",
            ParallelLayout(cfg=2, pp=2, ulysses=2, vae=2),
            "cfg=2, pp=2, ulysses=2, vae_patch=2",
            ("pp", "sp", "cfgp", "vae_patch"),
        ),
        ("cfg=2,vae_patch=1", ParallelLayout(cfg=2), "cfg=2", ("cfgp",)),
        ("pipefusion=3", FusedLayout(pp=3), "pipefusion=3", ("pipefusion",)),
        ("pipefusion=1,cfg=2", ParallelLayout(cfg=2), "cfg=2", ("cfgp",)),
        (
            "vae_patch=2,pipefusion=2,ulysses=1",
            FusedLayout(pp=2, vae=2),
            "pipefusion=2, vae_patch=2",
            ("pipefusion", "vae_patch"),
        ),
        (f"ulysses={MAX_RANKS}", ParallelLayout(ulysses=MAX_RANKS), "ulysses=64", ("sp",)),
    ],
)
def test_a_layout_is_read_named_and_served(
    text: str, layout: ParallelLayout, name: str, strategies: tuple[str, ...]
) -> None:
    assert parse_layout(text) == layout
    assert layout_name(layout) == name
    assert strategies_of(layout) == strategies
    assert name == "single" or parse_layout(name) == layout


def test_every_degree_of_a_strategy_may_be_asked_for() -> None:
    assert list(DEGREES) == [
        "cfg",
        "pp",
        "pipefusion",
        "ring",
        "ulysses",
        "hsdp",
        "vae_patch",
    ]
    served = {degree for degrees in STRATEGIES.values() for degree in degrees}
    assert set(DEGREES.values()) == served


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("vae_patch=3", 3),
        ("cfg=2,vae_patch=2", 2),
        ("ulysses=2,vae_patch=2", 2),
        ("hsdp=3", 3),
        ("ulysses=2,hsdp=2,vae_patch=2", 2),
        ("hsdp=2,vae_patch=3", 6),
    ],
)
def test_ranks_of_an_overlay_are_those_that_there_are(text: str, ranks: int) -> None:
    assert parse_layout(text).world_size == ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty layout; legal: name=degree"),
        (" ", "an empty layout; legal: name=degree"),
        ("cfg=2,", "an empty part in 'cfg=2,'; legal: name=degree"),
        (",,cfg=2", "an empty part in ',,cfg=2'"),
        (
            "tp=2",
            "'tp' is no degree that the demonstration knows; "
            "legal: cfg, pp, pipefusion, ring, ulysses, hsdp, vae_patch",
        ),
        (
            "CFG=2",
            "'CFG' is no degree .*; legal: cfg, pp, pipefusion, ring, ulysses, hsdp, vae_patch",
        ),
        ("=2", "'' is no degree .*; legal: cfg, pp, pipefusion, ring, ulysses, hsdp, vae_patch"),
        ("2", "'2' is no degree .*; legal: cfg, pp, pipefusion, ring, ulysses, hsdp, vae_patch"),
        ("order=2", "'order' is no degree"),
        ("cfg", "cfg has no degree in 'cfg'; nearest: cfg=2"),
        ("cfg=", "cfg= is no number of ranks; legal: a whole number from 1 to 64"),
        ("ulysses=two", "ulysses=two is no number of ranks"),
        ("ulysses=2.0", "ulysses=2.0 is no number"),
        ("ulysses=1_0", "ulysses=1_0 is no number"),
        ("ulysses=²", "is no number"),
        ("ulysses=" + "9" * 5000, "is no number of ranks; legal: .* 1 to 64"),
        ("cfg==2", "cfg==2 is no number"),
        ("ring=0", "ring=0 is no degree; .* nearest legal value is ring=1"),
        ("cfg=-2", "cfg=-2 is no degree; .* nearest legal value is cfg=1"),
        ("ring=2,ulysses=2,ring=3", "ring is given twice in .*; legal: once, such as ring=3"),
        ("cfg=3", "cfg=3: .* has 2 guidance branches, .*; legal: 1, 2"),
        ("pp=7", "pp=7: .* has 6 blocks, .*; legal: 1 to 6$"),
        ("pp=999999999", "has 6 blocks"),
        ("pp=0", "pp=0 is no degree; .* nearest legal value is pp=1"),
        (
            "pp=2,hsdp=2",
            "hsdp=2 would shard weights over peers of pp, whose weights differ; nearest legal "
            "hsdp: 1$",
        ),
        (
            "cfg=2,pipefusion=3",
            "pipefusion and cfg do not go together: .* legal: pipefusion=3, with any of "
            "vae_patch; or cfg=2, with any of pp, ring, ulysses, hsdp, vae_patch$",
        ),
        ("pipefusion=2,ulysses=2", "pipefusion and ulysses do not go together: patches"),
        ("pipefusion=2,ring=2", "pipefusion and ring do not go together: patches"),
        ("hsdp=2,pipefusion=2", "pipefusion and hsdp do not go together: both leave"),
        ("pp=2,pipefusion=2", "pipefusion and pp do not go together: both cut"),
        ("pp=1,pipefusion=2", "pipefusion and pp do not go together"),
        ("pipefusion=7", "pipefusion=7: .* has 6 blocks, .*; legal: 1 to 6$"),
        ("pipefusion=0", "pipefusion=0 is no degree; .* nearest legal value is pipefusion=1"),
        ("pp=6,ulysses=64", "is 384 ranks; .* nearest: pp=6,ulysses=10"),
        (
            "vae=2",
            "'vae' is no degree .*; legal: cfg, pp, pipefusion, ring, ulysses, hsdp, vae_patch",
        ),
        ("vae_patch=0", "vae_patch=0 is no degree; .* nearest legal value is vae_patch=1"),
        (
            "cfg=2,vae_patch=3",
            "vae_patch=3 does not divide the 2 ranks; nearest legal vae_patch: 1, 2$",
        ),
        ("hsdp=0", "hsdp=0 is no degree; .* nearest legal value is hsdp=1"),
        (
            "cfg=2,hsdp=3",
            "^hsdp=3 does not divide the world of 2 ranks; nearest legal hsdp: 1, 2$",
        ),
        ("fs=2", "'fs' is no degree .*; legal: .*hsdp"),
        ("ulysses=96,hsdp=48,vae_patch=12", "; nearest: ulysses=64,hsdp=32,vae_patch=8"),
        ("hsdp=6,vae_patch=35", "is 210 ranks; .* nearest: hsdp=4,vae_patch=32"),
        ("vae_patch=65", "vae_patch=65 is 65 ranks; .* nearest: vae_patch=64"),
        ("vae_patch=999999999", "legal: up to 64; nearest: vae_patch=64"),
        ("ulysses=96,vae_patch=48", "is 96 ranks; .* nearest: ulysses=64,vae_patch=32"),
        ("cfg=4,ulysses=64", "cfg=4: .* has 2 guidance branches"),
        ("ulysses=65", "ulysses=65 is 65 ranks; legal: up to 64; nearest: ulysses=64"),
        ("ulysses=64,cfg=2", "is 128 ranks; .* nearest: ulysses=32,cfg=2"),
        ("cfg=2,ring=7,ulysses=5", "is 70 ranks; .* nearest: cfg=2,ring=6,ulysses=5"),
        ("ring=999999999,ulysses=999999999", "legal: up to 64; nearest: "),
    ],
)
def test_what_is_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(click.BadParameter, match=message) as refused:
        parse_layout(text)
    _, found, nearest = refused.value.message.partition("up to 64; nearest: ")
    if found:
        assert parse_layout(nearest).world_size <= MAX_RANKS


def test_there_are_as_many_patches_as_stages() -> None:
    layout = parse_layout("pipefusion=3,vae_patch=3")
    assert options_of(layout, "pipefusion") == {"patches": 3, "force": True}
    assert options_of(layout, "vae_patch") == options_of(parse_layout("pp=3"), "pp") == {}


def test_ranks_are_of_ulysses_unless_a_layout_says_what_they_are() -> None:
    assert choose_layout(None, None) == ParallelLayout(ulysses=2)
    assert choose_layout(5, None) == ParallelLayout(ulysses=5)
    both = ParallelLayout(cfg=2, ulysses=2)
    assert choose_layout(None, both) == both
    assert choose_layout(4, both) == both


@pytest.mark.parametrize(("ranks", "layout"), [(3, "cfg=2"), (2, "cfg=2,ulysses=2"), (2, "cfg=1")])
def test_ranks_that_contradict_the_layout_are_refused(ranks: int, layout: str) -> None:
    asked = parse_layout(layout)
    message = (
        rf"{ranks}, but --layout has {asked.world_size} \(.*\); legal here: {asked.world_size}"
    )
    with pytest.raises(click.BadParameter, match=message):
        choose_layout(ranks, asked)


def test_there_are_as_many_blocks_as_the_model_has() -> None:
    config = json.loads((MODEL / "transformer" / "config.json").read_text())
    assert config["num_layers"] + config["num_single_layers"] == BLOCKS
