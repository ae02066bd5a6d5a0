"""The bytes, weights and operations of a plan are those of real modules on real ranks."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

import diffusers

import omni_parallel
from omni_group_coordinator import record_traffic
from omni_parallel import ParallelConfig
from omni_parallel.demo.pipeline import MODEL, load_pipeline
from omni_parallel.model_files import ModelFiles
from omni_parallel.plan.call_inputs import DENOISER_CLASSES, CallSize, blocks_of
from omni_parallel.plan.counting import Asked, Counted, count
from omni_parallel.plan.gpu_types import gpu_type
from omni_parallel.plan.machine import Machine
from omni_parallel.plan.prediction import predict
from omni_parallel.plan.recorded_call import record
from omni_parallel.plan.stage_cut import cut

PIXELS = 128
MANY, FEW = 5, 3


def counted(*, guidance: bool = True, dtype: str = "bfloat16") -> Counted:
    asked = Asked(width=PIXELS, height=PIXELS, steps=10, guidance=guidance, dtype=dtype)
    return count(ModelFiles.find(str(MODEL)), asked, lambda _: None)


@torch.no_grad()
def sent_in_a_step(layout: str) -> float:
    """Bytes that this rank sends for a step of a run in float32, without those of a call."""
    pipeline = load_pipeline(torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "negative_prompt": "",
        "true_cfg_scale": 3.0,
        "width": PIXELS,
        "height": PIXELS,
        "output_type": "latent",
        "max_sequence_length": pipeline.tokenizer_2.model_max_length,
    }
    sent = {}
    with omni_parallel.parallelize(pipeline, layout) as ready:
        for steps in (FEW, FEW, MANY):  # the first one agrees on shapes
            with record_traffic() as traffic:
                seed = torch.Generator().manual_seed(0)
                ready("a red circle", num_inference_steps=steps, generator=seed, **given)
            sent[steps] = traffic.total_bytes
    return (sent[MANY] - sent[FEW]) / (MANY - FEW)


@pytest.mark.parametrize("layout", ["ulysses=2", "ring=2", "cfg=2", "pp=2"])
def test_bytes_are_those_that_ranks_send(ranks: Any, layout: str) -> None:
    config = ParallelConfig.parse(layout)
    work = counted(dtype="float32").work
    predicted = predict(work, config, Machine(gpu_type("h100-sxm"), 2))
    measured = max(ranks.run(sent_in_a_step, layout, world_size=2, timeout=110))
    assert measured == predicted.step_bytes > 0


def test_weights_are_those_of_the_model() -> None:
    pipeline, work = load_pipeline(torch.device("cpu")), counted().work
    assert work.weights is not None
    for name in ("text_encoder", "text_encoder_2", "vae"):
        module = getattr(pipeline, name)
        assert work.weights[name] == pytest.approx(
            2 * sum(p.numel() for p in module.parameters()), rel=1e-3
        )
    whole = 2 * sum(p.numel() for p in pipeline.transformer.parameters())
    assert sum(part.weights for part in work.parts) == whole
    machine = Machine(gpu_type("h100-sxm"), 2)
    held = predict(work, ParallelConfig(ulysses=2, hsdp=2), machine).memory.weights
    assert held == whole // 2 + sum(work.weights.values())


@torch.no_grad()
def test_operations_are_those_of_a_real_call() -> None:
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with (
        FlopCounterMode(display=False) as real,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        layer.train()(x)  # the fast path of evaluation hides its products
    found = record(layer.to("meta"), lambda: layer(x.to("meta")))
    assert found.flops == real.get_total_flops()


_LAYERS = (
    "num_layers",
    "num_single_layers",
    "n_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
)
_MORE = {
    "PixArtTransformer2DModel": {"caption_channels": 4096},
    "UNet2DConditionModel": {"cross_attention_dim": 768},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", DENOISER_CLASSES)
def test_every_known_class_is_called_and_its_blocks_are_found(name: str) -> None:
    made, kind = getattr(diffusers, name), DENOISER_CLASSES[name]
    given = {one: 2 for one in _LAYERS if one in inspect.signature(made).parameters}
    with torch.device("meta"):
        model = made(**{**given, **_MORE.get(name, {})})
    size = CallSize(48, 32, 2 if kind.temporal > 1 else 1, 30, torch.float32)
    blocks = blocks_of(model, kind)
    found = record(model, lambda: model(**kind.inputs(model.config, size)), blocks)
    assert found.output_bytes > 0
    assert len(found.blocks) == (sum(given.values()) or 8)  # a UNet: four down, four up
    assert all(block.matmul_flops > 0 and block.output_bytes > 0 for block in found.blocks)
    if given and name != "SanaTransformer2DModel":  # whose attention is linear
        assert all(one.attended for one in found.blocks)


def test_more_ranks_never_compute_more() -> None:
    work = counted(guidance=False).work
    gpu = replace(gpu_type("a100-80gb"), memory_gbps=1e9)  # else reading weights is most of it
    for name in ("ulysses", "ring", "pipefusion"):
        layouts = {n: ParallelConfig.parse(f"{name}={n}") for n in (1, 2, 4)}
        times = [predict(work, one, Machine(gpu, n)).compute for n, one in layouts.items()]
        assert times == sorted(times, reverse=True)
        assert times[-1] < times[0]


def test_guidance_halves_a_step_and_stages_alone_do_not_help_one_branch() -> None:
    work, gpu = replace(counted().work, batched=False), gpu_type("h200")
    alone = predict(work, ParallelConfig(), Machine(gpu, 1)).compute
    assert predict(work, ParallelConfig(cfg=2), Machine(gpu, 2)).compute == pytest.approx(alone / 2)
    single = replace(work, branches=1)
    alone = predict(single, ParallelConfig(), Machine(gpu, 1)).compute
    assert predict(single, ParallelConfig(pp=2), Machine(gpu, 2)).compute >= alone * 0.999


def test_sharing_weights_takes_less_memory_and_sends_more() -> None:
    work = counted().work
    machine = Machine(gpu_type("l40s"), 4)
    whole = predict(work, ParallelConfig(ulysses=4), machine)
    shared = predict(work, ParallelConfig(ulysses=4, hsdp=4), machine)
    assert shared.memory.weights < whole.memory.weights
    assert shared.step_bytes > whole.step_bytes
    cutting = predict(work, ParallelConfig(pp=4), machine)
    assert cutting.memory.weights < whole.memory.weights


@pytest.mark.parametrize(
    ("weights", "stages", "heaviest"),
    [([4, 4, 1, 1, 1, 1], 2, 8), ([4, 4, 1, 1, 1, 1], 3, 4), ([1, 9, 1], 3, 9), ([5, 1, 1], 3, 5)],
)
def test_stages_are_as_even_as_blocks_allow(weights: list[int], stages: int, heaviest: int) -> None:
    runs = cut(weights, stages)
    assert len(runs) == stages
    assert [weight for run in runs for weight in weights[run]] == weights
    assert max(sum(weights[run]) for run in runs) == heaviest
    assert all(weights[run] for run in runs)
