"""One value for all strategies: its forms, its layout, and every mistake at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_group_coordinator import ParallelConfigError
from omni_parallel import ParallelConfig, explain
from omni_parallel.v1.parallel_config import degree_names
from omni_parallel_state import ParallelLayout

CONFIG = ParallelConfig(
    cfg=2, ulysses=4, vae_patch=8, vae_mode="exact", options={"sp": {"kv_exchange": "auto"}}
)
TOML = """
cfg = 2
ulysses = 4
vae_patch = 8
vae_mode = "exact"
[options.sp]
kv_exchange = "auto"
"""


def test_all_forms_are_one_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(json.dumps(CONFIG.to_dict()))
    assert ParallelConfig.of(tmp_path / "a.toml") == CONFIG
    assert ParallelConfig.of(str(tmp_path / "a.json")) == CONFIG
    assert ParallelConfig.of(CONFIG.to_dict()) == CONFIG
    assert ParallelConfig.of(CONFIG) is CONFIG
    short = ParallelConfig.of("cfg=2, ulysses=4,vae_patch=8,vae_mode=exact")
    assert short == ParallelConfig.of({**CONFIG.to_dict(), "options": {}})
    assert ParallelConfig.of(None) == ParallelConfig() == ParallelConfig.parse("")


@given(st.fixed_dictionaries({name: st.integers(1, 8) for name in degree_names()}))
def test_the_short_form_comes_back(degrees: dict[str, Any]) -> None:
    config = ParallelConfig(**degrees)
    text = str(config)
    again = ParallelConfig.parse(text)
    assert {**again.to_dict(), "dp": again.dp or 1} == {**config.to_dict(), "dp": degrees["dp"]}


def test_strategies_come_in_the_order_in_which_they_are_applied() -> None:
    config = ParallelConfig(
        cfg=2, ring=2, pp=2, vae_patch=2, hsdp_replicate=2, options={"mine": {"a": 1}}
    )
    assert config.strategies() == ("pp", "hsdp", "sp", "cfgp", "vae_patch", "mine")
    assert config.options_of("vae_patch") == {"mode": "auto"}
    assert config.options_of("mine") == {"a": 1}
    assert config.options_of("sp") == {}


def test_the_layout_is_that_of_the_degrees() -> None:
    assert CONFIG.layout(16) == ParallelLayout(dp=2, cfg=2, ulysses=4, vae=8)
    assert CONFIG.ranks == 8
    assert ParallelConfig(hsdp=2, hsdp_replicate=2, vae_patch=3).ranks == 12
    assert ParallelConfig(pipefusion=2).layout(2) == ParallelLayout(pp=2)


def test_messages_about_the_layout_use_the_names_of_the_configuration() -> None:
    with pytest.raises(ParallelConfigError, match=r"vae_patch=3 does not divide .* vae_patch: 1"):
        ParallelConfig(cfg=2, vae_patch=3).layout(2)
    with pytest.raises(ParallelConfigError, match=r"pipefusion=3 does not divide the world of 2"):
        ParallelConfig(pipefusion=3).layout(2)
    with pytest.raises(ParallelConfigError, match=r"hsdp=3 .* hsdp with hsdp_replicate=1: 1, 2"):
        ParallelConfig(cfg=2, hsdp=3).layout(2)


def test_every_mistake_is_listed_at_once() -> None:
    with pytest.raises(ParallelConfigError) as caught:
        ParallelConfig.parse("cfg=2,ulyses=4,ring=0,cfg=3,x,vae_patch=two,vae_mode=some")
    for part in (
        "'x' is no name=degree",
        "cfg is given twice",
        "vae_patch=two is no number of ranks",
        "unknown: ulyses; legal: dp, cfg, ulysses",
        "ring=0 is no number of ranks; legal: 1 (off) or more; nearest: ring=1",
        "vae_mode='some'; legal: 'auto', 'exact', 'tile'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cfg": True}, "cfg=True is no number of ranks"),
        ({"cfg": 2.0}, "cfg=2.0 is no number of ranks"),
        ({"dp": 0}, "dp=0 is no number of ranks"),
        ({"options": {"sp": 3}}, "legal: a dict of options for each strategy"),
        ({"options": ["sp"]}, "legal: a dict of options for each strategy"),
    ],
)
def test_values_that_are_none(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ParallelConfigError) as caught:
        ParallelConfig(**values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "cfg = ", "is no TOML"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[1]", "holds a list; legal: a table of dp, cfg"),
        ("a.toml", "cfk = 2", "unknown: cfk"),
        ("none.toml", None, "No such file"),
    ],
)
def test_files_that_hold_none(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ParallelConfigError) as caught:
        ParallelConfig.of(str(tmp_path / name))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_what_is_no_configuration_at_all() -> None:
    with pytest.raises(ParallelConfigError, match="3 is no configuration; legal: a ParallelConfig"):
        ParallelConfig.of(3)


def test_explain_says_what_each_rank_does() -> None:
    lines = explain(ParallelConfig(cfg=2, ring=2, vae_patch=4, vae_mode="tile")).splitlines()
    assert lines[0] == "cfg=2,ring=2,vae_patch=4,vae_mode=tile on 4 ranks"
    assert lines[3] == (
        "  rank 2: guidance branches, share 2 of 2; tokens, share 1 of 2; autoencoder, share 3 of 4"
    )
    assert "approximates" in lines[-1]
    assert explain("single").splitlines()[1] == "  rank 0: everything"
    assert explain("cfg=2") == explain({"cfg": 2}) == explain(ParallelConfig(cfg=2))
    with pytest.raises(ParallelConfigError, match="pp=2 and pipefusion=2: both cut"):
        explain("pp=2,pipefusion=2")
    assert "rank 1: replica 2 of 2" in explain(ParallelConfig(dp=2))
    assert "replica" not in explain(ParallelConfig(hsdp=2))
    assert "and so on to rank 31" in explain(ParallelConfig(ulysses=32))
