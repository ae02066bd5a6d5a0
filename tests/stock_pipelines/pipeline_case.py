"""What the small stock pipelines share: their description, weights, prompts, and their pictures."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 3


@dataclass(frozen=True)
class PipelineCase:
    """One unmodified pipeline of diffusers, and a call of it that is guided."""

    name: str
    kind: str
    """"batch": all branches in one call of the denoiser; "branches": a call for each branch."""
    build: Callable[[], Any]
    """Makes the pipeline, with the same random weights on every rank."""
    arguments: Callable[[Any], dict[str, Any]]
    """Makes the arguments of a call of the pipeline it is given, the same on every rank."""
    calls_per_step: int
    """How often the denoiser is called in a step in which all branches are computed."""
    denoisers: tuple[str, ...] = ("transformer",)
    """The names of the components that are called once for each branch, or for all of them."""


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def valid(length: int, tokens: int) -> Tensor:
    """The mask of one prompt: so many tokens of it, then padding."""
    return (torch.arange(length) < tokens).long().unsqueeze(0)


_QUERY_OR_KEY = re.compile(
    r"\b(add_)?(to_)?[qk](_proj)?\.weight$|\b(to_|add_)?(query|key)\.weight$"
)
_VALUE_OR_OUT = re.compile(
    r"\b(add_)?(to_)?v(_proj)?\.weight$|\b(to_)?value\.weight$|\bto_out(\.0)?\.weight$"
    r"|\b(to_add_out|to_qkv|out_layer|out_proj)\.weight$"
)
_MODULATION = re.compile(r"\bnorm\w*\.linear\.weight$")


def quietly(make: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """What is made, without the warnings of names that diffusers itself uses, or of numpy 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return make(*values, **options)


def sharpened(make: Callable[[], nn.Module], strength: float = 1.0, seed: int = 7) -> Any:
    """The model with weights by which a branch left out, or swapped, changes the picture.

    Those of attention are made larger, and those that training starts at zero are not zero. Where
    that is not enough, a strength makes them larger still, and those of adaptive norms too.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = quietly(make)
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
            elif _QUERY_OR_KEY.search(name):
                parameter.mul_(3 * strength)
            elif _VALUE_OR_OUT.search(name):
                parameter.mul_(2 * strength)
            elif _MODULATION.search(name):
                parameter.mul_(strength)
    return model.eval().requires_grad_(False)


def assembled(pipeline_class: Any, **components: Any) -> Any:
    """The pipeline of these components, of which those that a guided call can lack are None."""
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    missing = {
        parameter.name: None
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.name not in ("self", *components)
    }
    pipeline = quietly(pipeline_class, **missing, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def common(output_type: str = "latent", **more: Any) -> dict[str, Any]:
    """The arguments of nearly every pipeline."""
    return {
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": output_type,
    } | more


def picture(result: Any) -> Tensor:
    """The images, frames or latents of a pipeline's output."""
    for name in ("images", "frames", "image_embeddings", "sample", "latents"):
        if (found := getattr(result, name, None)) is not None:
            break
    else:
        found = result[0]
    if isinstance(found, Tensor):
        return found
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found)
    return torch.stack([torch.as_tensor(np.asarray(item)) for item in found])
