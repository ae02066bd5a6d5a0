"""What the demonstration is asked for, and whether the model can do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omni_group_coordinator import ParallelConfigError
from omni_parallel.demo.limits import MAX_SIZE
from omni_parallel.v1 import ModelFacts

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "a purple star right of an orange circle",
    "a blue triangle below a red square",
    "a large cyan ring",
    "a purple cross above a green ring",
    "an orange circle left of a green square",
    "a red star on a dark background",
    "a yellow square right of a purple triangle",
    "a small red square",
    "a green circle below a red triangle",
    "a cyan cross left of an orange ring",
)
"""Prompts of a run that is given none."""


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """One run of the demonstration."""

    prompts: tuple[str, ...] = PROMPTS
    negative_prompt: str = ""
    """What the second guidance branch is given."""
    guidance: float = 3.0
    """Weight of the guidance, ``true_cfg_scale`` of the pipeline."""
    steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """Picture i starts from noise of the seed ``seed + i``."""
    width: int = 128
    """Pixels."""
    height: int = 128
    """Pixels."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            msg = f"{self.steps} steps cannot make a picture; legal: 1 or more"
            raise ParallelConfigError(msg)
        if not self.prompts:
            msg = "no prompt was given; legal: one or more"
            raise ParallelConfigError(msg)


def check_size(request: DemoRequest, facts: ModelFacts) -> None:
    """Check that the pipeline can make pictures of the size asked for.

    Args:
        request: The run.
        facts: Of the model, whose pipeline would silently round to a multiple of its tokens.

    Raises:
        ParallelConfigError: With the nearest legal sizes.
    """
    multiple = facts.token_pixels or 1
    for name, pixels in (("width", request.width), ("height", request.height)):
        if pixels % multiple or not multiple <= pixels <= MAX_SIZE:
            low = max(multiple, min(pixels, MAX_SIZE) // multiple * multiple)
            high = min(MAX_SIZE, low + multiple)
            near = str(low) if low in (high, pixels) else f"{low} and {high}"
            msg = (
                f"{name} {pixels}: the model makes pictures whose sides are multiples of "
                f"{multiple} pixels, up to {MAX_SIZE}; nearest: {near}"
            )
            raise ParallelConfigError(msg)


def check_prompts(request: DemoRequest, pipeline: FluxPipeline) -> None:
    """Check that the model can read every prompt.

    Raises:
        ParallelConfigError: A prompt is too long, or has words that the model does not know.
    """
    for prompt in (*request.prompts, request.negative_prompt):
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
            tokens, limit = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
            if tokens > limit:
                msg = (
                    f"the prompt {prompt!r} has {tokens} tokens, and the model reads {limit}; "
                    "shorten it (the pipeline would cut it off in silence)"
                )
                raise ParallelConfigError(msg)
        _check_words(prompt, pipeline.tokenizer_2)


def _check_words(prompt: str, tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = [
        word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word).input_ids
    ]
    if unknown:
        pieces = (piece.lstrip("\u2581").lower() for piece in tokenizer.get_vocab())
        known = sorted({piece for piece in pieces if piece.isalpha()})
        msg = (
            f"the prompt {prompt!r} has words that the model was not trained on: "
            f"{', '.join(unknown)}; it knows: {', '.join(known)}"
        )
        raise ParallelConfigError(msg)
