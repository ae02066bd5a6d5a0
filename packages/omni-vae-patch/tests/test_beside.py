"""Maps that an autoencoder is given beside its latent: the image and the mask of inpainting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_vaes import error, everyone, random, text_of
from stock_autoencoders.autoencoder_case import randomised
from torch import Tensor, nn

from omni_vae_patch import VaeParallelConfig, parallelize_vae

diffusers = pytest.importorskip("diffusers")
EXACT = VaeParallelConfig("exact")
SCALE = 8


def asymmetric() -> nn.Module:
    widths = (8, 8, 16, 16)
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        down_block_out_channels=widths,
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        up_block_out_channels=widths,
        norm_num_groups=4,
    )


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    image = random(1, 3, height * SCALE, width * SCALE, seed=1)
    mask = (random(1, 1, height * SCALE, width * SCALE, seed=2) > 0).float()
    return random(1, 4, height, width), image, mask


@torch.no_grad()
def inpainted(dims: list[Any]) -> list[float]:
    vae: Any = randomised(asymmetric)
    found = []
    for height, width in ((7, 5), (2, 2)):
        z, image, mask = inputs(height, width)
        plain, alone = vae.decode(z).sample, vae.decode(z, image=image, mask=mask).sample
        assert error(plain, alone) > 1e-3
        for dim in dims:
            with parallelize_vae(vae, VaeParallelConfig("exact", dim), group=everyone()):
                found += [
                    error(vae.decode(z).sample, plain),
                    error(vae.decode(z, image=image, mask=mask).sample, alone),
                    error(vae.decode(z, None, image, mask).sample, alone),
                ]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_takes_its_part_of_an_image_and_a_mask(ranks, world_size):
    for found in ranks.run(inpainted, ["height", "width"], world_size=world_size, timeout=120):
        assert max(found) <= 1e-5


@torch.no_grad()
def of_other_sides() -> list[Any]:
    vae: Any = randomised(asymmetric)
    z, image, mask = inputs(6, 4)
    alone = vae.decode(z, image=image, mask=mask).sample
    shorter = [image[..., : 5 * SCALE, :], image[..., : 3 * SCALE], image[..., :9, :6]]
    with parallelize_vae(vae, VaeParallelConfig("exact", verify=False), group=everyone()):
        found = [text_of(lambda x=x: vae.decode(z, image=x, mask=mask)) for x in shorter]
        mine = mask if torch.distributed.get_rank() else mask.repeat(2, 1, 1, 1)
        found.append(text_of(lambda: vae.decode(z, image=image, mask=mine)))
        return [*found, error(vae.decode(z, image=image, mask=mask).sample, alone)]


def test_one_of_other_sides_is_an_error_on_all_ranks_and_the_next_call_is_right(ranks):
    for *wrong, differs, off in ranks.run(of_other_sides, timeout=60):
        shapes = [(1, 3, 40, 32), (1, 3, 48, 24), (1, 3, 9, 6)]
        for text, shape in zip(wrong, shapes, strict=True):
            assert f"ParallelConfigError: decode is given a tensor of shape {shape}" in text
            assert "legal: 6 rows or columns" in text
        assert "RankMismatchError" in differs
        assert off <= 1e-5
