"""Everything wrong with a configuration is found from the model's configuration files."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from omni_group_coordinator import ParallelConfigError
from omni_parallel import ModelFacts, ParallelConfig, auto_config
from omni_parallel.demo.pipeline import MODEL
from omni_parallel.v1 import find_problems, installed_packages, strategies, validate

FACTS = ModelFacts(
    "FluxPipeline", "FluxTransformer2DModel", 4, 6, 2, 16, has_vae=True, is_transformer=True
)


def test_facts_of_a_saved_pipeline() -> None:
    assert ModelFacts.from_folder(MODEL) == replace(FACTS, branches=1)
    assert FACTS.tokens(128, 64) == 32
    assert replace(FACTS, token_pixels=None).tokens(128, 64) is None
    assert replace(FACTS, frames_per_token=4).tokens(32, 32, 17) == 4 * 5
    alone = ModelFacts.from_folder(MODEL / "transformer")
    assert (alone.heads, alone.blocks, alone.has_vae) == (4, 6, False)


@pytest.mark.parametrize(
    ("transformer", "vae", "pixels", "frames"),
    [
        (
            {"patch_size": [1, 2, 2], "in_channels": 16},
            {"z_dim": 16, "scale_factor_spatial": 8, "scale_factor_temporal": 4},
            16,
            4,
        ),
        (
            {"patch_size": 2, "in_channels": 64},
            {"_class_name": "AutoencoderKLQwenImage", "z_dim": 16},
            16,
            1,
        ),
        (
            {"patch_size": 2, "in_channels": 16},
            {"latent_channels": 16, "block_out_channels": [1, 2, 3, 4]},
            16,
            1,
        ),
        (
            {"patch_size": 1, "in_channels": 128},
            {"latent_channels": 128, "patch_size": 4, "block_out_channels": [1, 2, 3, 4]},
            32,
            1,
        ),
        (
            {"patch_size": 1, "in_channels": 128},
            {"latent_channels": 32, "patch_size": [2, 2], "block_out_channels": [1, 2, 3, 4]},
            16,
            1,
        ),
        (
            {"patch_size": 1, "in_channels": 32},
            {"latent_channels": 32, "encoder_block_out_channels": [1] * 6},
            32,
            1,
        ),
        (
            {"all_patch_size": [2], "in_channels": 16},
            {"latent_channels": 16, "block_out_channels": [1] * 4},
            16,
            1,
        ),
        ({"patch_size": 2}, {"_class_name": "AutoencoderOfAnother"}, None, 1),
    ],
)
def test_sides_of_a_token(transformer, vae, pixels, frames) -> None:
    parts = {"transformer": {"_class_name": "T", **transformer}, "vae": vae}
    facts = ModelFacts.from_configs("P", parts)
    assert (facts.token_pixels, facts.frames_per_token) == (pixels, frames)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ParallelConfigError, match="none is no folder; legal: a folder"):
        ModelFacts.from_folder(tmp_path / "none")
    with pytest.raises(ParallelConfigError, match="has no model_index"):
        ModelFacts.from_folder(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ParallelConfigError, match="cannot read"):
        ModelFacts.from_folder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps([1]))
    with pytest.raises(ParallelConfigError, match="holds a list"):
        ModelFacts.from_folder(tmp_path)


def test_all_problems_are_listed_with_the_nearest_that_work() -> None:
    config = ParallelConfig(cfg=4, ulysses=5, pp=7, hsdp=2)
    with pytest.raises(ParallelConfigError) as caught:
        validate(config, 8, FACTS, (32, 32, 1))
    said = str(caught.value)
    for part in (
        "cannot run on 8 ranks",
        "= 140 does not divide the world of 8 ranks",
        "ulysses=5: FluxTransformer2DModel has 4 heads",
        "pp=7: FluxTransformer2DModel has 6 blocks",
        "cfg=4: no pipeline has more than 3 guidance branches",
        "ulysses=5: 32 x 32 pixels are 4 tokens",
    ):
        assert part in said
    for text in said.rsplit("nearest legal: ", maxsplit=1)[-1].split(" or "):
        assert find_problems(ParallelConfig.parse(text), 8, FACTS, (32, 32, 1)) == []


def test_nearest_changes_as_little_as_it_can() -> None:
    with pytest.raises(ParallelConfigError, match=r"\nnearest legal: cfg=2,ulysses=4 or"):
        validate(ParallelConfig(cfg=2, ulysses=5), 8, FACTS)


def test_a_world_that_nobody_means_is_refused_at_once() -> None:
    config = ParallelConfig(ulysses=999_999_999, ring=999_999_999)
    with pytest.raises(ParallelConfigError, match="has 4 heads") as caught:
        validate(config, config.ranks, FACTS)
    assert "nearest legal: " not in str(caught.value).rsplit("\n", maxsplit=1)[-1]


def test_a_unet_has_no_tokens_and_a_module_no_autoencoder() -> None:
    unet = ModelFacts.from_configs("P", {"unet": {"_class_name": "UNet2DConditionModel"}})
    found = find_problems(ParallelConfig(ulysses=2, vae_patch=2), 2, unet)
    assert any("ulysses=2: UNet2DConditionModel is no transformer" in text for text in found)
    assert any("vae_patch=2: P has no autoencoder" in text for text in found)
    assert find_problems(ParallelConfig(cfg=2, hsdp=2), 2, unet) == []


def test_what_is_not_together_is_refused_by_name() -> None:
    config = ParallelConfig(pp=2, pipefusion=2)
    found = find_problems(config, config.ranks, FACTS)
    assert any("pipefusion=2" in text and "legal: either" in text for text in found)


def test_pipefusion_shares_tokens_without_the_strategy_for_it() -> None:
    many = ParallelConfig(pipefusion=2, ulysses=8)
    assert many.strategies() == ("pipefusion",)
    assert find_problems(many, 16, FACTS) == []  # more ranks than heads
    with_options = ParallelConfig(pipefusion=2, ulysses=2, options={"sp": {"kv_exchange": "auto"}})
    (found,) = find_problems(with_options, 4, FACTS)
    assert found == "options for 'sp': pipefusion shares tokens in its own way; legal: none"


@pytest.mark.parametrize(
    ("ranks", "heads", "branches", "short"),
    [
        (1, 4, 2, "single"),
        (2, 4, 2, "cfg=2,vae_patch=2"),
        (8, 4, 2, "cfg=2,ulysses=4,vae_patch=8"),
        (8, 4, 1, "ulysses=4,ring=2,vae_patch=8"),
        (6, 4, 2, "cfg=2,ulysses=3,vae_patch=6"),
        (5, 4, 2, "ring=5,vae_patch=5"),
        (3, None, 2, "ulysses=3,vae_patch=3"),
    ],
)
def test_auto_is_legal_and_follows_its_rule(ranks, heads, branches, short) -> None:
    facts = replace(FACTS, heads=heads, branches=branches)
    config = auto_config(ranks, facts)
    assert str(config) == short
    assert find_problems(config, ranks, facts) == []


def test_auto_for_a_unet_shares_branches_and_decoding() -> None:
    facts = replace(FACTS, is_transformer=False, heads=None)
    assert str(auto_config(4, facts)) == "cfg=2,vae_patch=4"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "entry_points", lambda group: ())
    monkeypatch.setattr(installed_packages, "entry_points", EntryPoints)
    found = find_problems(ParallelConfig(cfg=2), 2, FACTS)
    assert found == [
        "strategy 'cfgp' is not installed (installed: none); try: pip install omni-cfgp"
    ]


class Package:
    """Stands for an installed distribution."""

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, version


def entry(name: str, group: str, package: Package) -> EntryPoint:
    made = EntryPoint(name, "math:pi", group)
    vars(made).update(dist=package)
    return made


def test_another_version_of_the_api_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    later = entry("cfgp", "omni_parallel.v2.strategies", Package("omni-cfgp", "0.9.0"))
    monkeypatch.setattr(strategies, "entry_points", lambda group: ())
    monkeypatch.setattr(installed_packages, "entry_points", lambda: EntryPoints([later]))
    found = find_problems(ParallelConfig(cfg=2), 2, FACTS)
    assert found == [
        "omni-cfgp 0.9.0 speaks v2 of the API, omni-parallel 0.1.0 speaks v1; try: pip install "
        "--upgrade omni-parallel omni-cfgp"
    ]
    with pytest.raises(ParallelConfigError, match="speaks v2 of the API"):
        strategies.load_strategy("cfgp")


def test_another_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    later = entry("sp", strategies.STRATEGY_GROUP, Package("omni-sp", "0.2.0"))
    monkeypatch.setattr(strategies, "entry_points", lambda group: (later,))
    with pytest.raises(ParallelConfigError, match=r"omni-sp 0\.2\.0 does not go with .* 0\.1\.\*"):
        strategies.load_strategy("sp")


def test_versions_of_what_is_installed() -> None:
    found = {package.name: package for package in installed_packages.versions()}
    assert found["omni-pp"].strategies == ("pipefusion", "pp")
    assert found["omni-pp"].api == (1,)
    assert all(package.version == "0.1.0" for package in found.values())
    assert not any(package.problem for package in found.values())
