"""What is computed in the benchmark of stages: whole denoising loops of unmodified pipelines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from bench.models import TEXT_DIM, attention_bytes, build, inputs, near_square
from bench.pipelines import GuidedPipeline, build_pipeline


@dataclass(frozen=True)
class Work:
    """What one call of a pipeline makes.

    Attributes:
        name: In tables.
        images: In one batch.
        branches: Of guidance.
    """

    name: str
    images: int = 1
    branches: int = 2

    def of(self, guided: GuidedPipeline, request: int = 0) -> GuidedPipeline:
        """The same pipeline with what is asked of it; each request has noise of its own."""
        generator = torch.Generator().manual_seed(request)
        shape = (self.images, *guided.latents.shape[1:])
        scale, negative = guided.scale, guided.negative
        return replace(
            guided,
            latents=torch.randn(shape, generator=generator),
            positive=_repeated(guided.positive, self.images),
            negative=_repeated(negative, self.images) if self.branches > 1 else {},
            scale=scale if self.branches > 1 else (scale[0], 1.0),
        )


GUIDED: Final = Work("guided image")
UNGUIDED: Final = Work("image without guidance", branches=1)
BATCH: Final = Work("four images without guidance", images=4, branches=1)


def arguments(guided: GuidedPipeline, steps: int) -> dict[str, Any]:
    """Those with which the pipeline is called."""
    found: Any = replace(guided, pipeline=lambda **given: (given,)).sequential(steps)
    return dict(found)


def build_work(family: str, tokens: int, layers: int) -> GuidedPipeline:
    """A pipeline of a family of `bench.models`, the same one in every process."""
    return (_flux if family == "flux" else partial(build_pipeline, family))(tokens, layers)


def _flux(tokens: int, layers: int) -> GuidedPipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    given = inputs("flux", tokens)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build("flux", layers),
    )
    pipeline.set_progress_bar_config(disable=True)
    text, pooled = given["encoder_hidden_states"], given["pooled_projections"]
    height, width = near_square(given["hidden_states"].shape[1])
    generator = torch.Generator().manual_seed(1)
    return GuidedPipeline(
        pipeline,
        given["hidden_states"],
        {"height": 16 * height, "width": 16 * width},
        {"prompt_embeds": text, "pooled_prompt_embeds": pooled},
        {
            "prompt_embeds": torch.randn(text.shape, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, TEXT_DIM, generator=generator),
        },
        ("true_cfg_scale", 3.0),
        layers * attention_bytes(tokens, torch.float32),
    )


def _repeated(tensors: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: tensor.repeat_interleave(times, 0) for name, tensor in tensors.items()}
