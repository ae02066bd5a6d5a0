"""Models of diffusers and transformers whose weights ranks share."""

from __future__ import annotations

import pytest
import torch
from stock_sharded import CASES, ModelCase, randomised
from torch.distributed.tensor import DTensor
from toy_sharded import config, differences, equal, sharing, snapshot

from omni_hsdp import apply_hsdp_to_model, find_blocks, gathered, remove_hsdp

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SHAPES = {"2": (2, 1), "4": (4, 1), "2 x 2": (2, 2)}
BLOCKS = {
    "Flux": {"transformer_blocks.0", "single_transformer_blocks.1"},
    "QwenImage": {"transformer_blocks.2"},
    "Wan": {"blocks.0", "blocks.2"},
    "SD3": {"transformer_blocks.1"},
    "T5 encoder": {"encoder.block.2"},
    "UNet": {"mid_block.resnets.1", "up_blocks.0.attentions.0.transformer_blocks.0"},
}
every_model = pytest.mark.parametrize("name", CASES)


@every_model
def test_blocks_are_found_without_being_named(name):
    found = {block for block, _ in find_blocks(CASES[name].build())}
    assert BLOCKS[name] <= found
    repeated = {block.rpartition(".")[0] for block in BLOCKS[name]}
    assert not {block for block in found if block in repeated}


def run_sharded(
    case: ModelCase, shard: int, replicate: int, dtype: torch.dtype = torch.float32
) -> dict[str, object]:
    model, call = randomised(case.build).to(dtype), case.call()
    for name, value in call.items():
        if getattr(value, "dtype", None) is torch.float32:
            call[name] = value.to(dtype)
    with sharing(shard, replicate):
        expected, before = model(**call), snapshot(model)
        apply_hsdp_to_model(model, config(shard, replicate))
        every_step = [model(**call) for _ in range(2)]
        given_up = all(isinstance(p, DTensor) for p in model.parameters())
        with gathered(model):
            once = model(**call)
        remove_hsdp(model)
        return {
            "every step": [equal(found, expected) for found in every_step],
            "given up": given_up,
            "gathered once": equal(once, expected),
            "after removal": equal(model(**call), expected),
            "differences": differences(before, snapshot(model)),
        }


@every_model
@pytest.mark.parametrize("shape", SHAPES)
def test_sharded_outputs_are_those_of_the_whole_model_bit_for_bit(ranks, name, shape):
    assert_same(ranks, name, *SHAPES[shape])


@every_model
def test_they_are_in_bfloat16_too(ranks, name):
    assert_same(ranks, name, 2, 1, torch.bfloat16)


def assert_same(ranks, name, shard, replicate, dtype=torch.float32):
    world = shard * replicate
    for found in ranks.run(run_sharded, CASES[name], shard, replicate, dtype, world_size=world):
        assert found == {
            "every step": [True, True],
            "given up": True,
            "gathered once": True,
            "after removal": True,
            "differences": [],
        }
