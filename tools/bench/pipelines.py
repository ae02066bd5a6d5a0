"""Unmodified pipelines of diffusers with a guided call: the demonstration model, and random ones.

Prompts come in as embeddings and latents go out, so that a call is its denoising loop and little
else: no text encoder runs, and no VAE.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from bench.models import TEXT_DIM, attention_bytes, build, inputs, twin
from omni_parallel.demo.pipeline import load_pipeline, token_pixels

_SEED: Final = 5
_PROMPT: Final = "a red circle left of a blue square"

Guide = Callable[[Tensor, Tensor, float], Tensor]
"""Makes the prediction of those with and without the prompt, and a scale."""


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """The formula of most pipelines."""
    return negative + scale * (positive - negative)


def guided_with_norm(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """That of Qwen-Image: each token keeps the norm that it has with the prompt alone."""
    found = guided(positive, negative, scale)
    share: Tensor = positive.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
    return found * share


@dataclass(frozen=True)
class GuidedPipeline:
    """A pipeline, and how it is called with guidance.

    Attributes:
        pipeline: Of diffusers, unmodified.
        latents: Where the picture starts.
        size: Arguments that say how large it is.
        positive: Embeddings of the prompt, by argument.
        negative: The same of the negative one, without ``negative_`` before their names.
        scale: Name and value of the guidance scale; 1 is no guidance.
        attention_bytes: Of the whole queries of all attention layers, for one branch.
        guide: The formula within the pipeline.
    """

    pipeline: Any
    latents: Tensor
    size: dict[str, int]
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]
    scale: tuple[str, float]
    attention_bytes: int
    guide: Guide = guided

    @property
    def prediction_bytes(self) -> int:
        """Bytes of what one branch predicts in a step: as many as of the latents."""
        return self.latents.nbytes

    def twin(self) -> GuidedPipeline:
        """The same with a pipeline of its own, over the same weights in memory."""
        parts = self.pipeline.components
        own = {"transformer": twin(parts["transformer"])}
        own["scheduler"] = copy.deepcopy(parts["scheduler"])
        return replace(self, pipeline=_quiet(type(self.pipeline)(**{**parts, **own})))

    def sequential(self, steps: int) -> Tensor:
        """The latents that the pipeline makes: its transformer is called for one branch a time."""
        name, value = self.scale
        negative = {f"negative_{name}": tensor for name, tensor in self.negative.items()}
        return self._call(steps, self.latents, **self.positive, **negative, **{name: value})

    def batched(self, steps: int) -> Tensor:
        """The same latents, of one call of the transformer for both branches.

        The pipeline is asked for two pictures, one of each prompt, from the same noise and without
        guidance. A hook on the transformer then gives both the guided prediction in place of their
        own, so that they stay alike. All else, and all but nothing of the time, is the pipeline's.
        """
        both = {
            name: torch.cat([tensor, self.negative[name]]) for name, tensor in self.positive.items()
        }
        latents = torch.cat([self.latents, self.latents])
        hook = self.pipeline.transformer.register_forward_hook(self._guide_both)
        try:
            return self._call(steps, latents, **both, **{self.scale[0]: 1.0})[:1]
        finally:
            hook.remove()

    def _guide_both(self, _: object, __: object, output: tuple[Tensor]) -> tuple[Tensor]:
        positive, negative = output[0].chunk(2)
        prediction = self.guide(positive, negative, self.scale[1])
        return (torch.cat([prediction, prediction]),)

    def _call(self, steps: int, latents: Tensor, **arguments: Any) -> Tensor:
        found: Tensor = self.pipeline(
            num_inference_steps=steps,
            latents=latents,
            output_type="latent",
            return_dict=False,
            **self.size,
            **arguments,
        )[0]
        return found


def build_pipeline(family: str, size: int, layers: int) -> GuidedPipeline:
    """A pipeline and its call, the same ones in every process.

    Args:
        family: Of `PIPELINES`.
        size: Pixels of a side for the demonstration model, else tokens in attention.
        layers: Attention layers; the demonstration model has its own.
    """
    import tqdm  # type: ignore[import-untyped]

    # Else it makes a semaphore of the system's, which a rank that is ended leaves behind.
    tqdm.tqdm.set_lock(threading.RLock())
    return PIPELINES[family](size, layers)


def _demo(pixels: int, _: int) -> GuidedPipeline:
    pipeline = load_pipeline(torch.device("cpu"))
    config, image = pipeline.transformer.config, (pixels // token_pixels(pipeline)) ** 2
    positive = _demo_prompt(pipeline, _PROMPT)
    tokens = positive["prompt_embeds"].shape[1] + image
    width = config.num_attention_heads * config.attention_head_dim
    return GuidedPipeline(
        pipeline,
        _noise(1, image, config.in_channels),
        {"height": pixels, "width": pixels},
        positive,
        _demo_prompt(pipeline, ""),
        ("true_cfg_scale", 3.0),
        (config.num_layers + config.num_single_layers) * tokens * width * torch.float32.itemsize,
    )


def _demo_prompt(pipeline: Any, prompt: str) -> dict[str, Tensor]:
    with torch.no_grad():
        embeddings, pooled, _ = pipeline.encode_prompt(
            prompt, None, max_sequence_length=pipeline.tokenizer_2.model_max_length
        )
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def _qwen(tokens: int, layers: int) -> GuidedPipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    given = inputs("qwen", tokens)
    ((_, rows, columns),) = given["img_shapes"][0]
    text = given["encoder_hidden_states"]
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=build("qwen", layers),
    )
    return GuidedPipeline(
        _quiet(pipeline),
        given["hidden_states"],
        {"height": 16 * rows, "width": 16 * columns},
        {"prompt_embeds": text},
        {"prompt_embeds": _noise(1, text.shape[1], TEXT_DIM)},
        ("true_cfg_scale", 4.0),
        layers * attention_bytes(tokens, torch.float32),
        guided_with_norm,
    )


def _wan(tokens: int, layers: int) -> GuidedPipeline:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    given = inputs("wan", tokens)
    frames, height, width = given["hidden_states"].shape[2:]
    text = given["encoder_hidden_states"]
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=scheduler,
        transformer=build("wan", layers),
    )
    return GuidedPipeline(
        _quiet(pipeline),
        given["hidden_states"],
        {"height": 8 * height, "width": 8 * width, "num_frames": 4 * frames - 3},
        {"prompt_embeds": text},
        {"prompt_embeds": _noise(1, text.shape[1], TEXT_DIM)},
        ("guidance_scale", 5.0),
        layers * attention_bytes(tokens, torch.float32),
    )


PIPELINES: Final[dict[str, Callable[[int, int], GuidedPipeline]]] = {
    "demo": _demo,
    "qwen": _qwen,
    "wan": _wan,
}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(_SEED))


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
