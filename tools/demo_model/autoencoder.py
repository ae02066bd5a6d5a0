"""The image autoencoder: 8 pixels to a latent, 8 channels, trained on the renderer's pictures."""

import random
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from demo_model.grammar import random_request
from demo_model.loop import learning_rate, optimiser_step, run_phase, seed_step
from demo_model.shapes import compose, render

CHANNELS: Final = 8
FACTOR: Final = 8
CROP_SHARE: Final = 0.75
"""Share of the steps on small crops, which are cheap; the rest sees whole pictures."""
PEAK_RATE: Final = 1.5e-3
REFINE_RATE: Final = 1e-3
REFINE_SEEDS: Final = 1_000_000
"""Keeps the pictures of the last phase apart from those of the first."""
KL_WEIGHT: Final = 5e-4
COLOUR_WEIGHT: Final = 5.0
COLOURFUL: Final = 0.4
"""Least distance between the strongest and the weakest primary of a coloured pixel."""
SIZES: Final = (96, 128, 128, 128, 192, 256)
"""Picture sizes to crop from: outlines must come out at any size of object."""


def build() -> AutoencoderKL:
    """Return an untrained autoencoder."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _batch(count: int, side: int, rng: random.Random) -> Tensor:
    size = max(side, rng.choice(SIZES))
    pictures = render([compose(random_request(rng), rng) for _ in range(count)], size, size)
    top, left = (rng.randint(0, size - side) for _ in range(2))
    return pictures[:, :, top : top + side, left : left + side]


def _slopes(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def _weights(pictures: Tensor) -> Tensor:
    """Weigh coloured areas up: they are a tenth of a picture and all of its meaning."""
    colourful = pictures.amax(dim=1, keepdim=True) - pictures.amin(dim=1, keepdim=True) > COLOURFUL
    return 1 + COLOUR_WEIGHT * colourful


def _losses(model: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(pictures).latent_dist
        decoded = model.decode(posterior.sample()).sample
    decoded = decoded.float()
    weights = _weights(pictures)
    difference = decoded - pictures
    error = (weights * (difference.abs() + difference.square())).mean()
    # Plain areas have no slope: this term makes outlines count.
    edges = sum(
        nn.functional.l1_loss(ours, theirs)
        for ours, theirs in zip(_slopes(decoded), _slopes(pictures), strict=True)
    )
    divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
    loss = error + edges + KL_WEIGHT * divergence
    return loss, {"l1": difference.abs().mean().item(), "kl": divergence.item()}


def train(work: Path, steps: int) -> AutoencoderKL:
    """Train, or finish training, the autoencoder under `work`."""
    model = build().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1e-4)

    def step(index: int) -> dict[str, float]:
        rng = random.Random(seed_step(index))
        cropped = index < CROP_SHARE * steps
        pictures = _batch(12, 64, rng) if cropped else _batch(6, 128, rng)
        loss, report = _losses(model, pictures.contiguous(memory_format=torch.channels_last))
        rate = learning_rate(index, steps, peak=PEAK_RATE, warm_up=60)
        optimiser_step(loss, model, optimiser, rate)
        return report

    run_phase("autoencoder", work, steps, {"model": model, "optimiser": optimiser}, step)
    return model.eval().requires_grad_(False)


def refine_decoder(work: Path, vae: AutoencoderKL, steps: int) -> None:
    """Train the decoder alone, which leaves every encoded pool valid."""
    vae.decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=REFINE_RATE, weight_decay=1e-4)

    def step(index: int) -> dict[str, float]:
        pictures = _batch(6, 128, random.Random(seed_step(REFINE_SEEDS + index)))
        loss, report = _losses(vae, pictures.contiguous(memory_format=torch.channels_last))
        rate = learning_rate(index, steps, peak=REFINE_RATE, warm_up=20)
        optimiser_step(loss, vae.decoder, optimiser, rate)
        return report

    run_phase("decoder", work, steps, {"model": vae, "optimiser": optimiser}, step)
    vae.requires_grad_(False)
