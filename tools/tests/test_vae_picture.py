"""The picture of the guide to autoencoders is drawn from what the decoded pictures are off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from vae_picture import TILE, Decoded, decoded, decoded_by_tiles, decoder, draw


def test_differences_are_those_of_the_worst_colour_and_psnr_that_of_the_mean_square() -> None:
    whole = torch.zeros(3, 2, 2)
    picture = whole.clone()
    picture[1, 0, 1] = 0.5
    picture[2, 0, 1] = 0.25
    result = Decoded("off", picture, whole)
    assert result.difference.tolist() == [[0.0, 0.5], [0.0, 0.0]]
    assert result.psnr == pytest.approx(-10 * torch.tensor((0.25 + 0.0625) / 12).log10().item())
    assert Decoded("same", whole, whole).psnr == float("inf")


def test_every_result_is_drawn(tmp_path: Path) -> None:
    whole = torch.rand(3, 8, 8)
    results = [Decoded("same", whole, whole), Decoded("off", whole / 2, whole)]
    draw(results, tmp_path / "seams.png")
    assert (tmp_path / "seams.png").read_bytes().startswith(b"\x89PNG")


def test_the_tiles_are_smaller_than_the_picture_and_change_it() -> None:
    pytest.importorskip("diffusers")
    vae = decoder()
    channels = vae.config.latent_channels
    latent = torch.randn(
        1, channels, TILE + 2, TILE + 2, generator=torch.Generator().manual_seed(0)
    )
    result = Decoded("tiles", decoded_by_tiles(latent), decoded(vae, latent))
    assert result.difference.max() > 1e-2
