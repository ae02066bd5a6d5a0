"""What any pipeline of diffusers is asked for, by one process and by ranks alike."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni_group_coordinator import ParallelConfigError

NO_DIFFUSERS = "this needs diffusers; try: pip install 'omni-parallel[diffusers]'"


OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--guidance",
    "num_inference_steps": "--steps",
    "width": "--size",
    "height": "--size",
    "num_frames": "--frames",
}
"""Options of commands, by the argument of a pipeline's call that they stand for."""


@dataclass(frozen=True, kw_only=True)
class PipelineRequest:
    """A model, and the arguments of its call."""

    model: str
    """Folder that a pipeline was saved to, or its name on the hub."""
    prompts: tuple[str, ...] = ("a red fox in the snow",)
    negative_prompt: str | None = None
    """None: none is given, which for some pipelines means no guidance."""
    guidance: float | None = None
    """Scale of the guidance; None: the pipeline's default."""
    steps: int | None = None
    """None: the pipeline's default, as for the next three."""
    width: int | None = None
    """Pixels."""
    height: int | None = None
    frames: int | None = None
    """Of a video."""
    seed: int = 0
    dtype: str = "float32"
    output_type: str = "pt"

    def load(self) -> Any:
        """The pipeline, on the CPU.

        Raises:
            ParallelConfigError: diffusers is not installed, or finds no such pipeline.
        """
        try:
            from diffusers import DiffusionPipeline
            from huggingface_hub.errors import HFValidationError
        except ImportError as error:
            raise ParallelConfigError(NO_DIFFUSERS) from error
        here = Path(self.model).is_dir()
        try:
            return DiffusionPipeline.from_pretrained(
                self.model, dtype=getattr(torch, self.dtype), local_files_only=here
            )
        except (OSError, HFValidationError) as error:
            why = "is neither a folder here nor a pipeline that can be had"
            msg = f"{self.model} {'cannot be loaded' if here else why}: {error}"
            raise ParallelConfigError(msg) from error

    def arguments(self, pipeline: Any) -> dict[str, Any]:
        """What the pipeline is called with, but for the generator.

        Raises:
            ParallelConfigError: It takes no argument of a name that is asked for.
        """
        unknown = self.unknown_to(type(pipeline))
        if unknown:
            msg = f"{type(pipeline).__name__} takes no {', '.join(unknown)}; leave it out"
            raise ParallelConfigError(msg)
        legal = inspect.signature(type(pipeline).__call__).parameters
        given = self._given(legal)
        longest = _longest_text(pipeline)
        if "max_sequence_length" in legal and longest is not None:
            default = legal["max_sequence_length"].default
            if isinstance(default, int) and longest < default:
                given["max_sequence_length"] = longest
        return given

    def unknown_to(self, kind: type[Any]) -> list[str]:
        """Names of the arguments that the call of a class of pipelines does not take."""
        legal = inspect.signature(kind.__call__).parameters
        if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in legal.values()):
            return []
        return [name for name in self._given(legal) if name not in legal]

    def _given(self, legal: Container[str]) -> dict[str, Any]:
        scale = "true_cfg_scale" if "true_cfg_scale" in legal else "guidance_scale"
        asked = {
            "prompt": list(self.prompts) if len(self.prompts) > 1 else self.prompts[0],
            "negative_prompt": self._negative(),
            scale: self.guidance,
            "num_inference_steps": self.steps,
            "width": self.width,
            "height": self.height,
            "num_frames": self.frames,
            "output_type": self.output_type,
            "return_dict": False,
        }
        return {name: one for name, one in asked.items() if one is not None}

    def _negative(self) -> str | list[str] | None:
        if self.negative_prompt is None or len(self.prompts) == 1:
            return self.negative_prompt
        return [self.negative_prompt] * len(self.prompts)

    def generator(self) -> torch.Generator:
        """Noise of the seed, the same on every device."""
        return torch.Generator().manual_seed(self.seed)


def _longest_text(pipeline: Any) -> int | None:
    """Tokens that the last tokenizer takes; by default pipelines ask for those of large models."""
    tokenizer = getattr(pipeline, "tokenizer_2", None) or getattr(pipeline, "tokenizer", None)
    longest = getattr(tokenizer, "model_max_length", None)
    return longest if isinstance(longest, int) else None


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of ``192x128``, or of ``128``.

    Raises:
        ParallelConfigError: It is none.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"0*([1-9]\d*)(?:x0*([1-9]\d*))?", text, re.ASCII)
    if match is None:
        msg = f"--size {text}: no size; legal: pixels as 128 or as 192x128, at least 1"
        raise ParallelConfigError(msg)
    return int(match[1]), int(match[2] or match[1])
