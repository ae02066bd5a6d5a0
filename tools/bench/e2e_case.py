"""The cases of the benchmark of whole pipelines, and what each rank does in one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from bench.e2e_contestants import RANKS, WholeContestant
from bench.harness import Progress, process_group
from bench.models import build, inputs, twin
from bench.ready import Ready, make_ready, race_all
from bench.results import CaseResult, Measured
from bench.shims import without_accelerator

WARM_UP: Final = 1
STEPS: Final = 4
_SEED: Final = 5
_TOKENS: Final = 1280  # of 512² pixels with text, and of 17 frames of 256²


@dataclass(frozen=True)
class WholeCase:
    """One row of the benchmark.

    Attributes:
        name: What ``--rows`` calls it.
        title: What tables call it.
        build: Makes the pipeline and the arguments of its call.
    """

    name: str
    title: str
    build: Callable[[], tuple[Any, dict[str, Any]]]


def _flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    given = inputs("flux", _TOKENS)
    torch.manual_seed(_SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.4,
        shift_factor=0.1,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval().requires_grad_(False),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=build("flux", 6),
    )
    arguments = {
        "height": 512,
        "width": 512,
        "latents": given["hidden_states"],
        "prompt_embeds": given["encoder_hidden_states"],
        "pooled_prompt_embeds": given["pooled_projections"],
    }
    return pipeline, arguments


def _wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    given = inputs("wan", _TOKENS)
    torch.manual_seed(_SEED)
    vae: Any = AutoencoderKLWan(base_dim=16, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.mul_(0.1)  # below the clamp, which would hide differences
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval().requires_grad_(False),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=build("wan", 6),
    )
    text = given["encoder_hidden_states"]
    arguments = {
        "height": 256,
        "width": 256,
        "num_frames": 17,
        "latents": given["hidden_states"],
        "prompt_embeds": text,
        "negative_prompt_embeds": torch.randn(
            text.shape, generator=torch.Generator().manual_seed(_SEED)
        ),
        "guidance_scale": 5.0,
    }
    return pipeline, arguments


CASES: Final = {
    case.name: case
    for case in (
        WholeCase("flux-512", f"Flux 512 × 512, {STEPS} steps and decoding", _flux),
        WholeCase("wan-256x17", f"Wan 256 × 256 × 17 frames, guidance, {STEPS} steps", _wan),
    )
}


@torch.no_grad()
def race_case(
    progress: Progress, case: WholeCase, contestants: Sequence[WholeContestant], rounds: int
) -> CaseResult:
    """Run a case; every rank calls it."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with process_group(), without_accelerator():
        stock, arguments = case.build()

        def call(pipeline: Any) -> Tensor:
            pipeline.set_progress_bar_config(disable=True)
            found = pipeline(
                num_inference_steps=STEPS, output_type="pt", return_dict=False, **arguments
            )[0]
            return torch.as_tensor(found)

        reference = call(stock)
        progress.step(2)
        ready = []
        for contestant in contestants:
            ready.append(_prepare(stock, call, contestant, reference))
            progress.step()
        raced = race_all(lambda: call(stock), ready, rounds, progress.step)
    return CaseResult(
        case=case.title,
        ranks=RANKS,
        rival="diffusers",
        single=raced.single,
        together=raced.together,
        measured=raced.measured,
        core_share=raced.core_share,
        timed="image",
    )


def _prepare(
    stock: Any,
    call: Callable[[Any], Tensor],
    contestant: WholeContestant,
    reference: Tensor,
) -> Ready:
    own = _twin(stock)
    return make_ready(
        Measured(contestant.name, contestant.side),
        lambda: contestant.apply(own),
        lambda: (lambda: call(own), None),
        reference,
        warm_up=WARM_UP,
    )


def _twin(stock: Any) -> Any:
    """The same with modules and a scheduler of its own, over the same weights in memory."""
    parts = dict(stock.components)
    parts["transformer"], parts["vae"] = twin(stock.transformer), twin(stock.vae)
    parts["scheduler"] = copy.deepcopy(stock.scheduler)
    return type(stock)(**parts)
