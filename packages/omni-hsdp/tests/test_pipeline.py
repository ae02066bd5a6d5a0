"""A pipeline of diffusers whose transformer and text encoders are sharded: the same pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_files import adapter_of
from torch.distributed.tensor import DTensor
from toy_sharded import differences, sharing, snapshot

from omni_hsdp import HSDPStrategy, gathered, hsdp_report, whole_shapes
from omni_parallel_state import ParallelLayout, ParallelState

pytest.importorskip("diffusers")
demo = pytest.importorskip("omni_parallel.demo.pipeline")
# Those of diffusers, transformers and peft.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
NAMES = ("transformer", "text_encoder", "text_encoder_2")  # a Flux with CLIP and T5


def picture(pipeline: Any) -> torch.Tensor:
    return pipeline(
        "a red circle left of a blue square",
        num_inference_steps=2,
        height=48,
        width=64,
        max_sequence_length=pipeline.tokenizer_2.model_max_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def is_sharded(module):
    return all(isinstance(p, DTensor) for p in module.parameters())


def with_text_encoders(ranks, replicate):
    pipeline = demo.load_pipeline(torch.device("cpu"))
    with sharing(ranks, replicate) as state:
        expected, parts = picture(pipeline), [getattr(pipeline, name) for name in NAMES]
        before = [snapshot(part) for part in parts]
        with HSDPStrategy().apply(pipeline, state, text_encoders=True):
            sharded = [is_sharded(part) for part in parts]
            blocks = [len(hsdp_report(part).blocks) for part in parts]
            found = [torch.equal(picture(pipeline), expected)]
            with gathered(pipeline.transformer):
                found.append(torch.equal(picture(pipeline), expected))
        rest = [differences(b, snapshot(part)) for b, part in zip(before, parts, strict=True)]
        found.append(torch.equal(picture(pipeline), expected))
        return sharded, min(blocks) > 2, found, rest, float(expected.std()) > 0.01


@pytest.mark.parametrize(("shard", "replicate"), [(2, 1), (2, 2)], ids=["2", "2 x 2"])
def test_pictures_are_those_of_one_process(ranks, shard, replicate):
    size = shard * replicate
    for found in ranks.run(with_text_encoders, shard, replicate, world_size=size):
        assert found == ([True] * 3, True, [True] * 3, [[], [], []], True)


def beside_sequence_parallelism():
    from omni_sp import SequenceParallelConfig, apply_sequence_parallel

    pipeline = demo.load_pipeline(torch.device("cpu"))
    state = ParallelState(ParallelLayout(ulysses=2, fs=2))

    def split():
        config = SequenceParallelConfig(2, 1)
        return apply_sequence_parallel(pipeline.transformer, config, state=state)

    with state.use(), torch.no_grad():
        with split():
            expected = picture(pipeline)
        with HSDPStrategy().apply(pipeline, state, text_encoders=True), split():
            sharded = all(is_sharded(getattr(pipeline, name)) for name in NAMES)
            found = torch.equal(picture(pipeline), expected)
    state.destroy()
    return sharded, found


def test_weights_are_shared_by_the_ranks_of_a_sequence(ranks):
    pytest.importorskip("omni_sp")
    assert ranks.run(beside_sequence_parallelism, world_size=2) == [(True, True)] * 2


def with_adapter():
    pipelines = [demo.load_pipeline(torch.device("cpu")) for _ in range(2)]
    file = adapter_of(demo.load_pipeline(torch.device("cpu")).transformer)
    found: list[list[torch.Tensor]] = [[], []]
    with sharing(2) as state:
        handle = HSDPStrategy().apply(pipelines[1], state)
        for pipeline, pictures in zip(pipelines, found, strict=True):
            own = pipeline.transformer
            shared = pipeline is pipelines[1]
            if shared:
                with whole_shapes(own):
                    pipeline.load_lora_weights(dict(file), adapter_name="style")
            else:
                pipeline.load_lora_weights(dict(file), adapter_name="style")
            pictures.append(picture(pipeline))
            pipeline.set_adapters("style", 0.5)
            pictures.append(picture(pipeline))
            if shared:
                with gathered(own, write=True):
                    pipeline.fuse_lora()
            else:
                pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            pictures.append(picture(pipeline))
        handle.remove()
        return (
            [torch.equal(a, b) for a, b in zip(*found, strict=True)],
            not torch.equal(found[0][0], found[0][1]),
            torch.allclose(found[0][1], found[0][2], atol=1e-4),
        )


def test_an_adapter_of_the_pipeline_acts_as_on_one_process(ranks):
    pytest.importorskip("peft")
    assert ranks.run(with_adapter, world_size=2) == [([True] * 3, True, True)] * 2
