"""Checkpoints of transformers whose keys are not those of the model."""

from __future__ import annotations

import pytest
import torch
from stock_sharded import randomised
from toy_sharded import config, equal, sharing

from omni_hsdp import load_hsdp_model

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen_vl():
    """The text encoder of QwenImage, whose files have the keys of older releases."""
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=TEXT | {"rope_scaling": rope},
            vision_config=vision | {"out_hidden_size": 16},
            image_token_id=50,
            video_token_id=51,
            vision_start_token_id=52,
            vision_end_token_id=53,
        )
    )


def causal():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))


def load(cls, folder, shard):
    call = {"input_ids": torch.arange(12)[None] + 5, "return_dict": False, "use_cache": False}
    with sharing(shard):
        plain = cls.from_pretrained(folder).eval()
        for parameter in plain.parameters():  # they lie in the file: kernels round otherwise there
            parameter.data = parameter.data.clone()
        loaded = load_hsdp_model(cls, folder, config())
        return equal(loaded(**call), plain(**call))


@pytest.mark.parametrize(
    ("build", "cls"),
    [(qwen_vl, "Qwen2_5_VLForConditionalGeneration"), (causal, "Qwen2Model")],
    ids=["renamed", "base of a model with a head"],
)
def test_a_checkpoint_loads_as_from_pretrained_loads_it(ranks, tmp_path, build, cls):
    model = randomised(build)
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) - getattr(transformers, cls)(model.config).state_dict().keys()
    found = ranks.run(load, getattr(transformers, cls), tmp_path, 2, world_size=2)
    assert found == [True, True]
