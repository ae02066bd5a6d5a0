"""Loading from safetensors files, of which each rank reads its share."""

from __future__ import annotations

import pytest
import torch
from stock_sharded import CASES, randomised
from torch.distributed.tensor import DTensor
from toy_sharded import config, equal, sharing

from omni_hsdp import load_hsdp_model, remove_hsdp

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")


def saved(name, folder, dtype=None, **options):
    model = randomised(CASES[name].build)
    model.to(dtype).save_pretrained(folder, **options)
    return type(model)


def cast(call, dtype):
    return {
        key: value.to(dtype) if getattr(value, "dtype", None) is torch.float32 else value
        for key, value in call.items()
    }


def state_of(model):
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}


def same_state(one, other):
    return list(one) == list(other) and all(
        one[key][0] is other[key][0] and torch.equal(one[key][1], other[key][1]) for key in one
    )


def load_and_compare(cls, folder, call, shard, replicate, dtype, variant):
    """Against loading in the ordinary way."""
    with sharing(shard, replicate):
        plain = cls.from_pretrained(folder, dtype=dtype, variant=variant).eval()
        for parameter in plain.parameters():  # they lie in the file: kernels round otherwise there
            parameter.data = parameter.data.clone()
        call = cast(call(), dtype or torch.float32)
        expected, whole = plain(**call), state_of(plain)
        flags = {name: p.requires_grad for name, p in plain.named_parameters()}
        loaded = load_hsdp_model(
            cls, folder, config(shard, replicate), dtype=dtype, variant=variant
        )
        found = loaded(**call)
        shares = all(isinstance(p, DTensor) for p in loaded.parameters())
        remove_hsdp(loaded)
        return {
            "output": equal(found, expected),
            "sharded": shares,
            "evaluation": not any(module.training for module in loaded.modules()),
            "state": same_state(state_of(loaded), whole),
            "again": equal(loaded(**call), expected),
            "class": type(loaded) is cls,
            "flags": {n: p.requires_grad for n, p in loaded.named_parameters()} == flags,
        }


def check(ranks, cls, folder, name, shape=(2, 1), dtype=None, variant=None):
    shard, replicate = shape
    found = ranks.run(
        load_and_compare,
        cls,
        folder,
        CASES[name].call,
        shard,
        replicate,
        dtype,
        variant,
        world_size=shard * replicate,
    )
    for of_rank in found:
        assert of_rank == dict.fromkeys(of_rank, True)


@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (2, 2)], ids=["2", "4", "2 x 2"])
def test_an_indexed_checkpoint_of_several_files(ranks, tmp_path, shape):
    cls = saved("Flux", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    check(ranks, cls, tmp_path, "Flux", shape)


@pytest.mark.parametrize("name", ["QwenImage", "SD3", "UNet", "T5 encoder"])
def test_a_checkpoint_of_one_file(ranks, tmp_path, name):
    cls = saved(name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    check(ranks, cls, tmp_path, name)


@pytest.mark.parametrize("name", ["Wan", "SD3", "T5 encoder"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_weights_get_the_dtype_but_for_what_the_class_keeps_in_float32(
    ranks, tmp_path, name, dtype
):
    cls = saved(name, tmp_path)
    check(ranks, cls, tmp_path, name, dtype=dtype)


def test_an_indexed_variant(ranks, tmp_path):
    cls = saved("SD3", tmp_path, torch.bfloat16, variant="bf16", max_shard_size="50KB")
    assert list(tmp_path.glob("*.index.bf16.json"))
    check(ranks, cls, tmp_path, "SD3", dtype=torch.bfloat16, variant="bf16")


def test_one_rank_loads_all_and_needs_no_groups(tmp_path):
    cls = saved("T5 encoder", tmp_path)
    with sharing(1):
        loaded = load_hsdp_model(cls, tmp_path.parent, config(), subfolder=tmp_path.name)
        expected = randomised(CASES["T5 encoder"].build)
        call = CASES["T5 encoder"].call()
        assert equal(loaded(**call), expected(**call))
        assert same_state(state_of(loaded), state_of(expected))
        flags = [p.requires_grad for p in loaded.parameters()]
        assert flags == [p.requires_grad for p in expected.parameters()]
        remove_hsdp(loaded)
        assert equal(loaded(**call), expected(**call))
