"""What the demonstration's ranks share is read, and what cannot be drawn so is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.layout_option import MAX_RANKS, check_config, choose_config
from omni_parallel.demo.pipeline import MODEL, load_pipeline, token_pixels
from omni_parallel.demo.request import DemoRequest
from omni_parallel.demo.table import layout_name
from omni_parallel.v1 import ModelFacts, ParallelConfig

FACTS = ModelFacts.from_folder(MODEL)


@pytest.mark.parametrize(
    ("text", "config", "ranks", "name"),
    [
        ("cfg=2", ParallelConfig(cfg=2), 2, "cfg=2"),
        (" ulysses = 2, ring=4 ,cfg=1", ParallelConfig(ring=4, ulysses=2), 8, "ulysses=2, ring=4"),
        ("cfg=1", ParallelConfig(), 1, "single"),
        ("vae_patch=3", ParallelConfig(vae_patch=3), 3, "vae_patch=3"),
        ("hsdp=2,vae_patch=3", ParallelConfig(hsdp=2, vae_patch=3), 6, "hsdp=2, vae_patch=3"),
        (
            "vae_patch=2,ulysses=2,pp=2,cfg=2",
            ParallelConfig(cfg=2, pp=2, ulysses=2, vae_patch=2),
            8,
            "cfg=2, ulysses=2, pp=2, vae_patch=2",
        ),
        ("auto", ParallelConfig(ulysses=2, vae_patch=2), 2, "ulysses=2, vae_patch=2"),
    ],
)
def test_a_layout_is_read_and_named(
    text: str, config: ParallelConfig, ranks: int, name: str
) -> None:
    assert choose_config(None, text) == (config, ranks)
    assert layout_name(config) == name


def test_a_layout_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "layout.toml"
    file.write_text("ring = 3\n")
    assert choose_config(None, str(file)) == (ParallelConfig(ring=3), 3)


@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        (None, ParallelConfig(ulysses=2)),
        (1, ParallelConfig()),
        (3, ParallelConfig(ulysses=3)),
        (5, ParallelConfig(ring=5)),  # of 4 heads, and 5 ranks are no multiple of fewer
        (8, ParallelConfig(ulysses=4, ring=2)),
    ],
)
def test_ranks_share_the_tokens_unless_a_layout_says_what(
    ranks: int | None, config: ParallelConfig
) -> None:
    assert choose_config(ranks, None) == (config, ranks or 2)
    check_config(config, ranks or 2, DemoRequest(), FACTS)


def test_the_size_of_a_token_is_that_of_the_pipeline() -> None:
    pytest.importorskip("diffusers")
    assert FACTS.token_pixels == token_pixels(load_pipeline(torch.device("cpu")))


def test_patches_are_as_many_as_stages_and_settings_are_not_refused() -> None:
    config, _ = choose_config(None, "pipefusion=3,vae_patch=3")
    assert config.options_of("pipefusion") == {"patches": 3, "force": True}
    assert layout_name(config) == "pipefusion=3, vae_patch=3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty layout; legal: name=degree"),
        ("tp=2", "unknown: tp; legal: dp, cfg, ulysses, ring, pp, pipefusion, hsdp"),
        ("cfg", "'cfg' is no name=degree"),
        ("ulysses=" + "9" * 5000, "is no number of ranks; legal: 1"),
        ("ring=0", "ring=0 is no number of ranks; .*; nearest: ring=1"),
        ("ring=2,ring=3", "ring is given twice; legal: once"),
        ("cfg=3", "cfg=3: .* has 2 guidance branches, .*; legal: 1 to 2"),
        ("pp=7", "pp=7: .* has 6 blocks, .*; legal: 1 to 6"),
        ("ulysses=5", "ulysses=5: .* has 4 heads, .*; legal: 1 to 4, and ring for the rest"),
        ("pp=2,hsdp=2", "hsdp=2 would shard weights over peers of pp"),
        ("pp=2,pipefusion=2", "both cut the model's blocks into stages; legal: either"),
        ("cfg=2,vae_patch=3", "nearest legal: cfg=2,vae_patch=2 or cfg=2"),
        ("ring=65", "ring=65 is 65 ranks; legal: up to 64; nearest: ring=64"),
        ("ulysses=4,ring=64", "is 256 ranks; .* nearest: ring=64 or ulysses=2,ring=32"),
        ("vae_patch=999999999", "legal: up to 64; nearest: vae_patch=64"),
    ],
)
def test_what_cannot_be_drawn_so_is_refused(text: str, message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message) as refused:
        check_config(*choose_config(None, text), DemoRequest(), FACTS)
    _, found, nearest = str(refused.value).partition("up to 64; nearest: ")
    for one in nearest.split(" or ") if found else ():
        config, ranks = choose_config(None, one)
        assert ranks <= MAX_RANKS
        check_config(config, ranks, DemoRequest(), FACTS)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("ulysses=3,ring=3", (32, 64), "32 x 64 pixels are 8 tokens, .*; legal: up to 8 ranks"),
        ("pipefusion=3", (32, 16), "patches=3: 32 x 16 pixels are 2 tokens, .*; legal: 1 to 2"),
        ("pipefusion=2,ring=2", (48, 16), "3 tokens, .* for 2 ranks each; legal: 1 to 1"),
    ],
)
def test_there_is_a_token_for_every_share(text: str, size: tuple[int, int], message: str) -> None:
    config, ranks = choose_config(None, text)
    check_config(config, ranks, DemoRequest(), FACTS)
    with pytest.raises(ParallelConfigError, match=message):
        check_config(config, ranks, DemoRequest(width=size[0], height=size[1]), FACTS)


@pytest.mark.parametrize(("ranks", "layout"), [(3, "cfg=2"), (2, "cfg=2,ulysses=2")])
def test_ranks_that_contradict_the_layout_are_refused(ranks: int, layout: str) -> None:
    with pytest.raises(ParallelConfigError, match=rf"{layout} cannot run on {ranks} ranks"):
        check_config(*choose_config(ranks, layout), DemoRequest(), FACTS)
