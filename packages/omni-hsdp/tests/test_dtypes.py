"""Dtypes of a model that is cast, on several ranks and on one."""

from __future__ import annotations

import pytest
import torch
from stock_sharded import CASES, randomised
from torch import nn
from toy_sharded import config, differences, equal, seeded, sharing, snapshot, tensors_of, toy

from omni_hsdp import (
    GatherPolicy,
    HSDPInferenceConfig,
    apply_hsdp_to_model,
    gathered,
    hsdp_report,
    load_hsdp_model,
    remove_hsdp,
    set_policy,
)

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

HALF = torch.bfloat16


def cast(call):
    return {
        key: value.to(HALF) if getattr(value, "dtype", None) is torch.float32 else value
        for key, value in call.items()
    }


def dtypes_of(model):
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in named}


def loaded_in_half(cls, folder, call, shard):
    """Loaded in bfloat16, and cast by the configuration, while loading and later."""
    call = cast(call())
    with sharing(shard):
        plain = cls.from_pretrained(folder, dtype=HALF).eval()
        for parameter in plain.parameters():  # they lie in the file: kernels round otherwise there
            parameter.data = parameter.data.clone()
        expected, found = plain(**call), {}
        models = {
            "dtype": load_hsdp_model(cls, folder, config(), dtype=HALF),
            "cast while loading": load_hsdp_model(cls, folder, HSDPInferenceConfig(True)),
            "cast": apply_hsdp_to_model(
                cls.from_pretrained(folder).eval(), HSDPInferenceConfig(True)
            ),
        }
        for how, model in models.items():
            with gathered(model):
                same = dtypes_of(model) == dtypes_of(plain)
            found[how] = same, equal(model(**call), expected)
        return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shard", [1, 2])
def test_a_model_that_is_cast_is_as_if_it_had_been_loaded_so(ranks, tmp_path, name, shard):
    model = randomised(CASES[name].build)
    model.save_pretrained(tmp_path)
    for found in ranks.run(
        loaded_in_half, type(model), tmp_path, CASES[name].call, shard, world_size=shard
    ):
        assert found == dict.fromkeys(found, (True, True))


def removed(shard):
    model = randomised(CASES["SD3"].build)
    before = snapshot(model)
    with sharing(shard):
        apply_hsdp_to_model(model, HSDPInferenceConfig(True, output_dtype=torch.float64))
        out = [t.dtype for t in tensors_of(model(**cast(CASES["SD3"].call())))]
        remove_hsdp(model)
    return out, differences(before, snapshot(model))


@pytest.mark.parametrize("shard", [1, 2])
def test_removing_gives_buffers_and_weights_back_in_their_dtype(ranks, shard):
    assert ranks.run(removed, shard, world_size=shard) == [([torch.float64], [])] * shard


def test_one_rank_has_a_policy_that_can_be_changed():
    with sharing(1):
        model = nn.Sequential(*toy().blocks)
        apply_hsdp_to_model(model, config(param_dtype=HALF), conditions="*", policy=GatherPolicy(2))
        assert {p.dtype for p in model.parameters()} == {HALF}
        set_policy(model, "auto")
        assert hsdp_report(model).per_rank == (hsdp_report(model).total,)
        same = nn.Sequential(*toy().blocks).to(HALF)
        assert equal(model(seeded(2, 6).to(HALF)), same(seeded(2, 6).to(HALF)))
