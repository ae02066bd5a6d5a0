"""What PipeFusion refuses, by name and on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from deepened_pipelines import build
from pipefusion_cases import arguments, fused

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_pp.pipefusion import PipeFusionConfig
from omni_pp.pipefusion.quality import GOOD_ENOUGH, MEASURED, difference, fewest_steps, steps_of
from omni_pp.pipefusion.schedulers import check_scheduler
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@pytest.mark.parametrize(
    "options",
    [
        {"patches": 0},
        {"patches": -1},
        {"patches": 2.0},
        {"patches": True},
        {"warmup_steps": 0},
        {"warmup_steps": None},
        {"force": 1},
    ],
)
def test_illegal_values(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ParallelConfigError, match=f"{name}={value!r}; legal: "):
        PipeFusionConfig(**options)


@torch.no_grad()
def refusal(name: str, prepare: Any, change: Any, options: dict[str, Any]) -> str:
    """The error of applying it, or of a call; with ``"applied: "`` before that of a call."""
    pipeline = build(name)
    where = ""
    try:
        prepare(pipeline)
        with fused(pipeline, 2, **options):
            where = "applied: "
            change(pipeline)
            pipeline(**arguments(name, pipeline))
    except ParallelError as error:
        return f"{where}{type(error).__name__}: {error}"
    return "none"


def nothing(pipeline: Any) -> None:
    """Leave it as it is."""


def unknown_scheduler(pipeline: Any) -> None:
    class BlurringScheduler:
        config: ClassVar[dict[str, Any]] = {}

        def step(self, *args: Any) -> Any:
            return args

    pipeline.scheduler = BlurringScheduler()


def own_attention(pipeline: Any) -> None:
    class Averaging:
        def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states.mean(1, keepdim=True)

    pipeline.transformer.transformer_blocks[1].attn.processor = Averaging()


def processors_of_class(pipeline: Any) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    for module in pipeline.transformer.modules():
        if hasattr(module, "processor"):
            module.processor = FluxAttnProcessor()


def scheduler_replaced(pipeline: Any) -> None:
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)


def controlnet(pipeline: Any) -> None:
    model = pipeline.transformer
    model(
        hidden_states=torch.zeros(1, 16, model.config.in_channels),
        controlnet_block_samples=[torch.zeros(1, 16, model.inner_dim)],
    )


def ip_adapter(pipeline: Any) -> None:
    model = pipeline.transformer
    model(
        hidden_states=torch.zeros(1, 16, model.config.in_channels),
        joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1, 1, 8)]},
    )


@pytest.mark.parametrize(
    ("name", "prepare", "change", "options", "texts"),
    [
        ("CogView 4", nothing, nothing, {}, ["does not know how CogView4", "FluxTransformer2D"]),
        ("Flux", unknown_scheduler, nothing, {}, ["BlurringScheduler", "UniPCMultistep"]),
        ("Flux", own_attention, nothing, {}, ["transformer_blocks.1.attn", "Averaging"]),
        ("Flux", nothing, nothing, {"patches": 10_000}, ["applied: ", "legal here: 1 to "]),
        ("Flux", nothing, processors_of_class, {}, ["applied: ", "apply again"]),
        ("Flux", nothing, scheduler_replaced, {}, ["applied: ", "scheduler of the pipeline was"]),
        (
            "Flux",
            nothing,
            controlnet,
            {},
            ["applied: ", "'controlnet_block_samples'", "ControlNet"],
        ),
        ("Flux", nothing, ip_adapter, {}, ["applied: ", "'ip_adapter_image_embeds'"]),
        ("Flux", nothing, nothing, {"patches": 4, "force": False}, ["applied: ", "force=True"]),
    ],
    ids=[
        "class",
        "scheduler",
        "attention",
        "patches",
        "processor",
        "new scheduler",
        "controlnet",
        "ip-adapter",
        "few steps",
    ],
)
def test_refusals(
    ranks: RankPool,
    name: str,
    prepare: Callable[[Any], None],
    change: Callable[[Any], None],
    options: dict[str, Any],
    texts: list[str],
) -> None:
    for found in ranks.run(refusal, name, prepare, change, options, timeout=120):
        for text in texts:
            assert text in found
        assert found.startswith("applied: ") == ("applied: " in texts)


def other_configuration(rank_of: str) -> str:
    import os

    try:
        fused(build("Flux"), 2, patches=2 + int(os.environ["RANK"]))
    except ParallelError as error:
        return type(error).__name__
    return "none"


def test_ranks_that_were_given_different_patches(ranks: RankPool) -> None:
    assert ranks.run(other_configuration, "RANK") == ["RankMismatchError"] * 2


def test_a_denoiser_alone_has_no_steps() -> None:
    with pytest.raises(ParallelConfigError, match="apply it to the pipeline"):
        fused(build("Flux").transformer, 1)


class Thresholding:
    """As a DPM-Solver that cuts off each sample at a quantile."""

    config: ClassVar[dict[str, Any]] = {"thresholding": True}


def test_an_option_by_which_elements_meet() -> None:
    scheduler = type("DPMSolverMultistepScheduler", (Thresholding,), {})()
    with pytest.raises(ParallelConfigError, match=r"thresholding=True .* quantile"):
        check_scheduler(scheduler)
    scheduler.config = {"thresholding": False}
    check_scheduler(scheduler)


def test_fewest_steps_are_those_of_the_table() -> None:
    for (patches, warmup), row in MEASURED.items():
        fewest = fewest_steps(PipeFusionConfig(patches, warmup))
        assert all(psnr >= GOOD_ENOUGH for steps, psnr in row.items() if steps >= fewest)
        before = [psnr for steps, psnr in row.items() if steps < fewest]
        assert not before or before[-1] < GOOD_ENOUGH
    assert fewest_steps(PipeFusionConfig(3, 1)) == fewest_steps(PipeFusionConfig(4, 1))
    assert fewest_steps(PipeFusionConfig(99, 9)) == fewest_steps(PipeFusionConfig(8, 4))


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"num_inference_steps": 4}, 4),
        ({"num_inference_steps": np.int64(4)}, 4),
        ({"num_inference_steps": 28, "sigmas": np.linspace(1, 0.1, 4)}, 4),
        ({"num_inference_steps": 28, "timesteps": torch.arange(4)}, 4),
        ({"num_inference_steps": 28, "timesteps": None, "sigmas": [1.0, 0.5]}, 2),
        ({"num_inference_steps": 20, "strength": 0.2}, 4),
        ({"num_inference_steps": 20, "strength": 1.0}, 20),
        ({"prompt": "a fox"}, None),
    ],
)
def test_steps_of_a_request(arguments: dict[str, Any], steps: int | None) -> None:
    assert steps_of(arguments) == steps


def test_difference_of_pictures() -> None:
    exact = torch.zeros(3, 4)
    assert difference(exact, exact).psnr == float("inf")
    found = difference(exact + 0.1, exact)
    assert found.psnr == pytest.approx(20)
    assert found.largest == pytest.approx(0.1)
