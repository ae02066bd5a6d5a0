"""Models of diffusers in chunks give what they give whole, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from partition_case import randomised
from partition_flow import all_stages, assert_equal, run_chunks
from partition_models import CASES
from torch import nn

from omni_pp.partition import BlockList, find_block_lists

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32


@cache
def whole(name: str) -> tuple[nn.Module, Any]:
    model = randomised(CASES[name].build)
    with torch.no_grad():
        return model, model(**CASES[name].call())


every_model = pytest.mark.parametrize("name", CASES)


@every_model
def test_block_lists(name: str) -> None:
    model, _ = whole(name)
    expected = tuple(BlockList(one, length) for one, length in CASES[name].lists)
    assert find_block_lists(model) == expected


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("stages", [2, 3])
@every_model
def test_stages(name: str, stages: int, virtual: int) -> None:
    model, expected = whole(name)
    parts = all_stages(model, stages, virtual_stages=virtual)
    for _ in range(2):  # the second call finds all as the first did
        assert_equal(run_chunks(parts, **CASES[name].call()), expected)


@every_model
def test_every_single_cut(name: str) -> None:
    """In each list, and between the lists: before, at and after the border."""
    model, expected = whole(name)
    for point in range(1, sum(length for _, length in CASES[name].lists)):
        parts = all_stages(model, 2, points=[point])
        assert_equal(run_chunks(parts, **CASES[name].call()), expected)


@every_model
def test_every_block_alone(name: str) -> None:
    model, expected = whole(name)
    count = sum(length for _, length in CASES[name].lists)
    parts = all_stages(model, 1, virtual_stages=count)
    assert_equal(run_chunks(parts, **CASES[name].call()), expected)


@every_model
def test_blocks_depend_on_all_before(name: str) -> None:
    """So that a chunk that lost what arrived would be noticed."""
    model, expected = whole(name)
    parts = all_stages(model, 2)
    blocks = parts[0].blocks_of(0)
    assert blocks
    with torch.no_grad():
        for parameter in blocks[0][1].parameters():
            parameter.mul_(1.5)
    found = run_chunks(parts, **CASES[name].call())
    with pytest.raises(AssertionError):
        assert_equal(found, expected)


@every_model
def test_state_dict_keys_keep_their_numbers(name: str) -> None:
    model, _ = whole(name)
    parts = all_stages(model, 3)
    keys = [set(part.model.state_dict()) for part in parts]
    everything = set(model.state_dict())
    in_blocks = {
        key
        for key in everything
        if key.startswith(tuple(f"{one}." for one, _ in CASES[name].lists))
    }
    assert set.union(*keys) == everything
    for part, held in zip(parts, keys, strict=True):
        own = {f"{block}." for block, _ in part.blocks_of(part.stage)}
        expected = {key for key in in_blocks if key.startswith(tuple(own))}
        assert held == expected | (everything - in_blocks)
        assert all(not one.is_meta for one in part.model.state_dict().values())


def test_positional_arguments() -> None:
    model, expected = whole("Wan")
    call = CASES["Wan"].call()
    values = [call["hidden_states"], call["timestep"], call["encoder_hidden_states"]]
    assert_equal(run_chunks(all_stages(model, 2), *values), expected)
