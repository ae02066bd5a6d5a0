"""Noise that a decoder draws is that of one rank, and random states stay as one rank's."""

from __future__ import annotations

import pytest
import torch
from small_vaes import error, everyone
from stock_autoencoders import CASES
from torch import Tensor

from omni_vae_patch import VaeParallelConfig, parallelize_vae

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)

NAME = "ltx-video-0.9.1"
SIZES = [(2, 3), (7, 6), (2, 2), (6, 7)]


@torch.no_grad()
def drawn() -> tuple[list[float], bool, bool]:
    """Errors of one size after the other from one seed; of three ranks some have no rows."""
    case = CASES[NAME]
    vae, group = case.build(), everyone()
    latents = [case.latent(height, width, 0) for height, width in SIZES]

    def decode(z: Tensor) -> Tensor:
        return vae.decode(z, temb=torch.full((1,), 0.05)).sample

    torch.manual_seed(5)
    alone = [decode(z) for z in latents]
    end = torch.get_rng_state()
    torch.manual_seed(5)
    begin = torch.get_rng_state()
    with parallelize_vae(vae, VaeParallelConfig("exact"), group=group):
        kept = torch.equal(torch.get_rng_state(), begin)
        found = [error(decode(z), expected) for z, expected in zip(latents, alone, strict=True)]
    return found, kept, torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_draw_the_noise_of_one_also_those_without_rows(ranks, world_size):
    for found, kept, same_end in ranks.run(drawn, world_size=world_size):
        assert kept, "making it parallel draws no random numbers"
        assert max(found) <= 1e-5
        assert same_end
