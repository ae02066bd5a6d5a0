"""ZImageTransformer2DModel on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import ModelCase, compare, every_mode, seeded
from torch import nn

diffusers = pytest.importorskip("diffusers")


def build(**options: Any) -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
        **options,
    )


def build_omni() -> nn.Module:
    return build(siglip_feat_dim=20)


def call(images: list[tuple[int, int]], texts: list[int]) -> dict[str, Any]:
    """The model pads image and text of each sample to multiples of 32 tokens, so none is odd."""
    return {
        "x": [
            seeded(16, 1, 2 * height, 2 * width, seed=i) for i, (height, width) in enumerate(images)
        ],
        "t": torch.linspace(0.3, 0.7, len(images)),
        "cap_feats": [seeded(length, 24, seed=i) for i, length in enumerate(texts)],
        "return_dict": False,
    }


def omni_call(images: list[tuple[int, int]], texts: list[int]) -> dict[str, Any]:
    """Two samples, each of one given image and one to be made."""
    flat = call(images, texts)
    batch = len(images) // 2
    return {
        "x": [[flat["x"][2 * i], flat["x"][2 * i + 1]] for i in range(batch)],
        "t": torch.linspace(0.3, 0.7, batch),
        "cap_feats": [
            [flat["cap_feats"][2 * i], flat["cap_feats"][2 * i + 1]] for i in range(batch)
        ],
        "siglip_feats": [[seeded(3, 5, 20, seed=i), None] for i in range(batch)],
        "image_noise_mask": [[0, 1]] * batch,
        "return_dict": False,
    }


def controlled(images: list[tuple[int, int]], texts: list[int], tokens: int) -> dict[str, Any]:
    """With what a ControlNet adds after some blocks, to the tokens of image and text."""
    samples = {index: seeded(len(images), tokens, 64, seed=index) for index in (0, 1)}
    return call(images, texts) | {"controlnet_block_samples": samples}


CASE = ModelCase(
    build,
    {
        "even": lambda: call([(4, 8)], [32]),
        "tokens that the model pads": lambda: call([(5, 7)], [9]),
        "samples of two sizes": lambda: call([(5, 7), (3, 5)], [33, 5]),
        "images of two sizes, one length": lambda: call([(5, 7), (3, 5)], [5, 33]),
        "ControlNet": lambda: controlled([(5, 7)], [9], 96),
        "ControlNet, two sizes": lambda: controlled([(5, 7), (3, 5)], [33, 5], 128),
    },
)

OMNI = ModelCase(
    build_omni,
    {
        "one sample": lambda: omni_call([(3, 5), (5, 7)], [9, 12]),
        "samples of two sizes": lambda: omni_call([(3, 5), (5, 7), (4, 4), (4, 5)], [9, 7, 40, 3]),
    },
)


@every_mode
def test_z_image(ranks: Any, mode: str) -> None:
    compare(ranks, CASE, mode)


@every_mode
def test_z_image_omni(ranks: Any, mode: str) -> None:
    compare(ranks, OMNI, mode)
