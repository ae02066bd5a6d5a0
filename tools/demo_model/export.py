"""Assembles the parts into a diffusers pipeline, draws pictures with it and lays them out."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image, ImageDraw

from demo_model.flow import Conditioned
from demo_model.loop import Average
from demo_model.pool import Tokenizers

LARGEST_HALF: Final = 65504.0
SAMPLES: Final = (
    "a red circle left of a blue square",
    "a green triangle above a yellow star",
    "a purple circle on a dark background",
    "an orange ring right of a cyan cross",
    "a small yellow star below a large red square",
    "a blue triangle left of an orange circle on a dark background",
    "a large cyan ring",
    "a purple cross above a green ring on a white background",
    "a red star",
    "a large yellow circle right of a small purple triangle",
    "a green square below a red triangle",
    "a small blue star on a white background",
)


def assemble(
    vae: AutoencoderKL,
    normal: tuple[float, float],
    tokenizers: Tokenizers,
    model: Conditioned,
    average: Average,
) -> FluxPipeline:
    """Return the pipeline with the averaged weights in half precision; change no argument."""
    averaged = copy.deepcopy(model)
    average.copy_to(averaged)
    vae = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
    # The pipeline computes latents / scaling_factor + shift_factor before it decodes.
    vae.register_to_config(shift_factor=normal[0], scaling_factor=1 / normal[1])
    for module in (vae, averaged):
        for parameter in module.parameters():
            parameter.data = parameter.data.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=vae,
        text_encoder=averaged.clip,
        tokenizer=tokenizers[0],
        text_encoder_2=averaged.t5,
        tokenizer_2=tokenizers[1],
        transformer=averaged.transformer,
    )


def load(folder: Path) -> FluxPipeline:
    """Load a saved pipeline in single precision, as a caller would."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample a picture."""

    seed: int = 0
    """Seed of the first picture of a batch; each next one takes the next."""
    size: tuple[int, int] = (128, 128)
    """Height and width in pixels, multiples of 16."""
    steps: int = 20
    scale: float = 3.0
    """Guidance against the empty caption; 1 means none."""


def generate(pipeline: FluxPipeline, captions: list[str], sampling: Sampling) -> list[Image.Image]:
    """Make one picture for each caption."""
    pictures: list[Image.Image] = pipeline(
        prompt=captions,
        negative_prompt=[""] * len(captions),
        true_cfg_scale=sampling.scale,
        num_inference_steps=sampling.steps,
        height=sampling.size[0],
        width=sampling.size[1],
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=[torch.Generator().manual_seed(sampling.seed + i) for i in range(len(captions))],
    ).images
    return pictures


def sheet(pictures: list[Image.Image], captions: list[str], columns: int = 4) -> Image.Image:
    """Lay pictures out with their captions underneath."""
    wide = max(picture.width for picture in pictures) + 32
    high = max(picture.height for picture in pictures) + 44
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * wide, rows * high), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = i % columns * wide, i // columns * high
        page.paste(picture, (left + 16, top + 8))
        draw.multiline_text((left + 8, top + picture.height + 12), _wrapped(caption), fill="black")
    return page


def _wrapped(caption: str, width: int = 26) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
