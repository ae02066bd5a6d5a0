"""The tiling of an autoencoder, turned on for a while."""

from __future__ import annotations

import pytest
from stock_autoencoders import CASES

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.tiles import enabled_tiling, tiling_options


def test_options_are_set_and_restored() -> None:
    vae = CASES["kl"].build()
    before = tiling_options(vae)
    assert before["use_tiling"] is False
    with enabled_tiling(vae, tile_latent_min_size=4, tile_sample_min_size=16):
        inside = tiling_options(vae)
    changed = {"use_tiling": True, "tile_latent_min_size": 4, "tile_sample_min_size": 16}
    assert inside == before | changed
    assert tiling_options(vae) == before


def test_options_are_restored_after_an_error() -> None:
    vae = CASES["wan-2.1"].build()
    before = tiling_options(vae)
    with pytest.raises(KeyError), enabled_tiling(vae, tile_sample_min_height=32):
        raise KeyError
    assert tiling_options(vae) == before


def test_a_scale_keeps_the_relations_of_the_lengths() -> None:
    vae = CASES["wan-2.1"].build()
    before = tiling_options(vae)
    with enabled_tiling(vae, scale=0.25, tile_sample_stride_width=40):
        inside = tiling_options(vae)
    assert inside["tile_sample_min_height"] == before["tile_sample_min_height"] // 4
    assert inside["tile_sample_stride_height"] == before["tile_sample_stride_height"] // 4
    assert inside["tile_sample_stride_width"] == 40


def test_what_cannot_be_set_is_refused_with_what_can() -> None:
    vae = CASES["kl"].build()
    with pytest.raises(ParallelConfigError, match=r"it has: .*tile_latent_min_size"):
        enabled_tiling(vae, tile_height=3).__enter__()
    with pytest.raises(ParallelConfigError, match="is no length"):
        enabled_tiling(vae, scale=0.3).__enter__()
    with pytest.raises(ParallelConfigError, match="has no tiling of its own"):
        enabled_tiling(CASES["temporal-decoder"].build()).__enter__()
    assert vae.use_tiling is False
