"""Modular pipelines of diffusers, whose guidance is an object that changes from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageAutoBlocks
from stock_pipelines import CASES
from torch import Tensor

from omni_cfgp import apply_cfg_parallel
from omni_parallel_state import ParallelLayout, ParallelState

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS = 4


def perturbed() -> Any:
    layers = diffusers.LayerSkipConfig(
        indices=[0],
        fqn="transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    return diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=layers,
    )


GUIDERS: dict[str, Callable[[], Any]] = {
    "always": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    "in some steps": lambda: diffusers.ClassifierFreeGuidance(4.0, start=0.3, stop=0.8),
    "with momentum": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
    "three branches": perturbed,
}


def picture(guider: Any, divided: bool) -> tuple[Tensor, int]:
    """The latents, and how often this rank called the transformer."""
    case = CASES["Qwen-Image"]
    stock = case.build()
    blocks = QwenImageAutoBlocks()
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipeline = blocks.init_pipeline()
    parts = {"transformer": stock.transformer, "scheduler": stock.scheduler, "guider": guider}
    pipeline.update_components(**parts)
    given, calls = case.arguments(stock), []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    more: dict[str, Any] = {
        name: given[name] for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    for name in list(more):
        more[f"{name}_mask"] = torch.ones(more[name].shape[:2], dtype=torch.long)
    more |= {"height": 64, "width": 64, "num_inference_steps": STEPS}
    if divided:
        apply_cfg_parallel(pipeline, state=ParallelState(ParallelLayout(cfg=2)))
    found = pipeline(**more, generator=torch.Generator().manual_seed(5), output="latents")
    return found, len(calls)


@torch.no_grad()
def both(name: str) -> tuple[Tensor, int, Tensor, int]:
    return *picture(GUIDERS[name](), False), *picture(GUIDERS[name](), True)


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_of_modular_pipelines(ranks, name):
    for alone, calls, found, own in ranks.run(both, name):
        assert torch.equal(found, alone)
        assert type(found) is Tensor
        assert own < calls
