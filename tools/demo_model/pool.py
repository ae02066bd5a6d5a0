"""Pools of pictures, encoded ahead of time: the transformer never waits for the autoencoder.

Shape letters: N pictures, T packed latent tokens, L text tokens.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from demo_model.autoencoder import CHANNELS, FACTOR
from demo_model.grammar import Request, random_request
from demo_model.loop import SEED
from demo_model.shapes import compose, render
from demo_model.text import LENGTH

Tokenizers = tuple[CLIPTokenizer, T5Tokenizer]

NATIVE: Final = (128, 128)
WORDINGS: Final = 2
"""Wordings of the same request kept for each picture."""
SENTENCE_SHARE: Final = 0.15
"""Share of the captions that begin with a capital, and share that end with a full stop."""
_BATCH_PIXELS: Final = 32 * 128 * 128


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Encoded pictures of one size with their captions."""

    size: tuple[int, int]
    """Height and width in pixels."""
    latents: Tensor
    """Packed latents, N T 4·CHANNELS, not yet shifted and scaled."""
    clip_ids: Tensor
    """N WORDINGS L."""
    t5_ids: Tensor
    """N WORDINGS L."""


def pack(latents: Tensor) -> Tensor:
    """Fold each 2x2 block of latents into one token, as `FluxPipeline` does."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str]) -> Tensor:
    """Return token ids padded to `LENGTH`."""
    batch = tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    ids: Tensor = batch.input_ids
    return ids


def trained_request(rng: random.Random) -> Request:
    """Draw a request that is not held out for measuring."""
    while (request := random_request(rng)).held_out():
        pass
    return request


def _caption(request: Request, rng: random.Random) -> str:
    text = request.text(rng)
    text = text[0].upper() + text[1:] if rng.random() < SENTENCE_SHARE else text
    return text + "." if rng.random() < SENTENCE_SHARE else text


def encode_pool(
    vae: AutoencoderKL,
    tokenizers: Tokenizers,
    size: tuple[int, int],
    count: int,
) -> Pool:
    """Draw, caption and encode `count` pictures of one size."""
    height, width = size
    rng = random.Random(f"{SEED} {size}")
    torch.manual_seed(SEED)
    batch = max(1, _BATCH_PIXELS // (height * width))
    latents, captions = [], []
    for start in track(range(0, count, batch), f"encoding {height}x{width}"):
        requests = [trained_request(rng) for _ in range(min(batch, count - start))]
        pictures = render([compose(request, rng) for request in requests], height, width)
        captions += [_caption(request, rng) for request in requests for _ in range(WORDINGS)]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            channels_last = pictures.contiguous(memory_format=torch.channels_last)
            posterior = vae.encode(channels_last).latent_dist
            latents.append(pack(posterior.sample().float()).half())
    clip_ids, t5_ids = (tokenize(tokenizer, captions) for tokenizer in tokenizers)
    tokens = height * width // (2 * FACTOR) ** 2
    return Pool(
        size=size,
        latents=torch.cat(latents).view(count, tokens, 4 * CHANNELS),
        clip_ids=clip_ids.view(count, WORDINGS, LENGTH),
        t5_ids=t5_ids.view(count, WORDINGS, LENGTH),
    )


def load_pool(
    work: Path,
    vae: AutoencoderKL,
    tokenizers: Tokenizers,
    size: tuple[int, int],
    count: int,
) -> Pool:
    """Return the pool of a size, encoding it on first use."""
    path = work / f"pool_{size[0]}x{size[1]}_{count}.pt"
    if not path.exists():
        pool = encode_pool(vae, tokenizers, size, count)
        torch.save(vars(pool), path)
    state = torch.load(path, weights_only=True)
    return Pool(**state)


def statistics(pool: Pool) -> tuple[float, float]:
    """Return the mean and the standard deviation of all latents."""
    values = pool.latents.float()
    return values.mean().item(), values.std().item()
