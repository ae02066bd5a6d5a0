"""A pipeline as diffusers has them, of torch alone, that counts what it does.

A transformer, guidance, an autoencoder.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

WIDTH, LENGTH, STEPS = 16, 10, 3


class Block(nn.Module):
    """Attention over all tokens, and something for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Two heads."""
        heads = self.qkv(tokens + text).unflatten(-1, (3, 2, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return tokens + torch.tanh(self.out(mixed))


class Transformer(nn.Module):
    """Predicts noise."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> tuple[Tensor]:
        """The noise of one branch of guidance."""
        text = encoder_hidden_states.mean(1, keepdim=True) + 0.1 * timestep.reshape(-1, 1, 1)
        for block in self.blocks:
            hidden_states = block(hidden_states, text)
        return (self.head(hidden_states),)


class Autoencoder(nn.Module):
    """Decodes latents to a picture of twice their size."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=4)
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """The picture, as diffusers returns it."""
        sample = self.decoder(z)
        return SimpleNamespace(sample=sample) if return_dict else (sample,)


class Scheduler:
    """Steps along the prediction."""

    def step(self, prediction: Tensor, t: Any, latents: Tensor, return_dict: bool = True) -> Any:
        """The latents of the next step."""
        return (latents - 0.3 * prediction,)


class Pipeline:
    """Draws with guidance: a denoiser that is called twice for each step."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.transformer = Transformer().eval().requires_grad_(False)
        self.vae = Autoencoder().eval().requires_grad_(False)
        self.scheduler = Scheduler()
        self.done: dict[str, int] = {}
        self.transformer.blocks[0].register_forward_hook(self._count_tokens)
        self.vae.decoder[-1].register_forward_hook(self._count_pixels)

    @torch.no_grad()
    def __call__(self, seed: int = 1) -> Tensor:
        """A picture; the same seed, the same picture.

        Afterwards ``done`` has what this process did for it: ``tokens`` of all calls of the first
        block, ``pixels`` that were decoded, and the ``weights`` that it held of the transformer.
        """
        self.done = dict.fromkeys(("tokens", "pixels", "weights"), 0)
        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, LENGTH, WIDTH, generator=random)
        prompt, negative = torch.randn(2, 1, 5, WIDTH, generator=random)
        for t in torch.linspace(1.0, 0.1, STEPS):
            guided = self.transformer(latents, prompt, t)[0]
            unguided = self.transformer(latents, negative, t)[0]
            prediction = unguided + 3 * (guided - unguided)
            latents = self.scheduler.step(prediction, t, latents)[0]
        picture: Tensor = self.vae.decode(latents.reshape(1, 4, LENGTH, 4)).sample
        held = [getattr(p, "to_local", lambda p=p: p)() for p in self.transformer.parameters()]
        self.done["weights"] = sum(tensor.numel() for tensor in held)
        return picture

    def _count_tokens(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.done["tokens"] += output.shape[1]

    def _count_pixels(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.done["pixels"] += output.shape[-2] * output.shape[-1]
