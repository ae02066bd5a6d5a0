"""What the small stock autoencoders share: their description, weights, inputs and results."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderCase:
    """One unmodified autoencoder of diffusers, with latents to decode and samples to encode."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the autoencoder, with the same random weights on every rank."""
    latent: Callable[[int, int, int], Tensor]
    """Makes a latent of a height and a width, which depends on these and a seed alone."""
    sample: Callable[[int, int, int], Tensor]
    """Makes the image or video for a latent of a height and a width, given in latent positions."""
    is_video: bool
    scale: int
    """How many positions of a sample, along height and along width, one of a latent stands for."""


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Random values that depend on shape and seed alone.

    Their mean and size change along height and width, so that no part is as the whole is.
    """
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    down = torch.linspace(-1, 1, shape[-2])[:, None]
    across = torch.linspace(-1, 1, shape[-1])
    return values * (1 + 0.4 * down - 0.3 * across) + 0.6 * down + 0.5 * across


def image_case(
    name: str, make: Callable[[], nn.Module], channels: int, scale: int, quiet: float = 1.0
) -> AutoencoderCase:
    """The case of an autoencoder of single images."""
    return AutoencoderCase(
        name=name,
        build=lambda: randomised(make, quiet),
        latent=lambda height, width, seed: seeded(1, channels, height, width, seed=seed),
        sample=lambda height, width, seed: seeded(1, 3, height * scale, width * scale, seed=seed),
        is_video=False,
        scale=scale,
    )


def video_case(
    name: str,
    make: Callable[[], nn.Module],
    channels: int,
    scale: int,
    frames: tuple[int, int],
    quiet: float = 1.0,
) -> AutoencoderCase:
    """The case of an autoencoder of videos: frames are those of the latent and of the sample."""
    latent_frames, sample_frames = frames

    def latent(height: int, width: int, seed: int) -> Tensor:
        return seeded(1, channels, latent_frames, height, width, seed=seed)

    def sample(height: int, width: int, seed: int) -> Tensor:
        return seeded(1, 3, sample_frames, height * scale, width * scale, seed=seed)

    build = lambda: randomised(make, quiet)  # noqa: E731
    return AutoencoderCase(name, build, latent, sample, is_video=True, scale=scale)


_QUERY_OR_KEY = re.compile(r"\bto_[qk]\.weight$")
_VALUE_OR_OUT = re.compile(r"(attn|attentions)\.(.*\.)?(to_v|proj|proj_out|to_out(\.0)?)\.weight$")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@torch.no_grad()
def randomised(make: Callable[[], nn.Module], quiet: float = 1.0, seed: int = 7) -> nn.Module:
    """The model with weights by which each position, edge, statistic and token counts.

    No norm is the identity, no bias is zero, attention is sharp, and nothing that training starts
    at zero is zero. `quiet` multiplies the last convolution of the decoder, for the models that
    clamp what they decode: the difference of two values that were clamped would not be seen.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
                _random_projection(module)
        for name, parameter in model.named_parameters():
            if _is_of_a_norm(name, parameter):
                _random_norm(name, parameter)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.3)
            elif _QUERY_OR_KEY.search(name):
                parameter.mul_(3)
            elif name.endswith("to_qkv.weight"):
                _sharpen_fused(parameter)
            elif _VALUE_OR_OUT.search(name):
                parameter.mul_(2)
            elif re.search(r"^decoder\.conv_out\.(.*\.)?(weight|bias)$", name):
                parameter.mul_(quiet)
    return model.eval().requires_grad_(False)


def _random_projection(module: Any) -> None:
    """Weights that keep the size of what they are given, and a bias that shows at a zero."""
    fan_in = module.weight[0].numel()
    nn.init.normal_(module.weight, std=fan_in**-0.5)
    if module.bias is not None:
        nn.init.normal_(module.bias, std=0.3)


def _is_of_a_norm(name: str, parameter: Tensor) -> bool:
    values = parameter.numel()
    return "norm" in name.rsplit(".", 2)[-2] and values == max(parameter.shape)


def _random_norm(name: str, parameter: Tensor) -> None:
    nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.4)


def _sharpen_fused(parameter: Tensor) -> None:
    """Queries, keys and values of one convolution."""
    query, key, value = parameter.chunk(3)
    query.mul_(3)
    key.mul_(3)
    value.mul_(2)


TIMESTEP = 0.05


@torch.no_grad()
def decoded(vae: Any, latent: Tensor) -> Tensor:
    """The image or video of a latent.

    Some decoders add noise, which they draw from the generator of the process: it is seeded here.
    """
    arguments: dict[str, Any] = {}
    if "num_frames" in inspect.signature(vae.decode).parameters:
        arguments["num_frames"] = latent.shape[0]
    if getattr(vae.config, "timestep_conditioning", False):
        arguments["temb"] = torch.full((latent.shape[0],), TIMESTEP, device=latent.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        result: Tensor = vae.decode(latent, **arguments).sample
    return result


@torch.no_grad()
def encoded(vae: Any, sample: Tensor) -> Tensor:
    """The latent of an image or video: mean and log-variance, where it is a distribution."""
    output = vae.encode(sample)
    for name in ("latent", "latents"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    parameters: Tensor = output.latent_dist.parameters
    return parameters
