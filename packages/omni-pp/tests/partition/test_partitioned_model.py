"""What a stage holds: its memory, what it lets go of, and how all of it comes back."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import partition_toys as toys
import pytest
import torch
from partition_case import randomised
from partition_flow import all_stages, run_chunks
from partition_images import flux, flux_call
from partition_models import CASES
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition import PartitionedModel, partition_model


def bytes_of(*modules: nn.Module) -> int:
    unique = {id(one): one for module in modules for one in module.parameters()}
    return sum(one.numel() * one.element_size() for one in unique.values())


def everything(model: nn.Module) -> dict[str, Any]:
    """Each parameter and buffer, also those that no state dict has."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def give_back(parts: list[PartitionedModel], device: str = "cpu") -> None:
    """As stages do it with a broadcast each: all go through the same weights in the same order."""
    for together in zip(*(part.materialize(device) for part in parts), strict=True):
        owners = {owner for owner, _ in together}
        assert len(owners) == 1
        assert len({(one.shape, one.dtype) for _, one in together}) == 1
        source = together[owners.pop()][1]
        assert not source.is_meta
        for _, tensor in together:
            with torch.no_grad():
                tensor.copy_(source)
    for part in parts:
        part.restore()


def test_what_is_let_go_leaves_memory_at_once() -> None:
    model = toys.Toy()
    kept = [weakref.ref(one.linear.weight) for one in list(model.blocks)[:2]]
    gone = [weakref.ref(one.linear.weight) for one in list(model.blocks)[2:]]
    gone += [weakref.ref(one.scale) for one in list(model.blocks)[2:]]
    modules = [weakref.ref(one) for one in model.blocks]
    part = partition_model(model, 2, stage=0, points=[2])
    assert all(one() is not None for one in kept)
    assert all(one() is None for one in gone)
    assert all(one() is not None for one in modules)
    assert [name for name, _ in part.released()] == ["blocks.2", "blocks.3", "blocks.4"]
    assert [id(block) for _, block in part.released()] == [id(one()) for one in modules[2:]]
    for _, block in part.released():
        assert all(tensor.is_meta for tensor in everything(block).values())


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_promised_bytes_are_held(name: str, virtual: int) -> None:
    model = CASES[name].build()
    parts = all_stages(model, 3, virtual_stages=virtual)
    lists = [model.get_submodule(one) for one, _ in CASES[name].lists]
    blocks = [block for one in lists for block in one]
    outside = bytes_of(model) - bytes_of(*blocks)
    for part in parts:
        own = [blocks[i] for chunk in part.chunks for i in chunk.blocks]
        assert part.parameter_bytes == outside + bytes_of(*own)
        assert part.parameter_bytes < bytes_of(model)
        for other in parts:
            assert other.promised_bytes(part.stage) == part.parameter_bytes
    assert sum(part.parameter_bytes - outside for part in parts) == bytes_of(*blocks)


def test_keeping_the_others() -> None:
    model = toys.Toy()
    whole = bytes_of(model)
    part = partition_model(model, 2, stage=0, release=False)
    assert part.parameter_bytes == whole
    assert part.promised_bytes(0) < whole
    assert part.released() == []
    assert len(part.blocks_of(1)) == 5 - len(list(model.blocks.children()))
    part.restore()
    assert torch.equal(model(toys.toy_input()), toys.Toy()(toys.toy_input()))


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("name", ["Flux", "ZImage"])
def test_all_comes_back_bit_for_bit(name: str, virtual: int) -> None:
    original = randomised(CASES[name].build)
    copies = [copy.deepcopy(original) for _ in range(3)]
    objects = [dict(one.named_modules()) for one in copies]
    parts = [
        partition_model(one, 3, stage=stage, virtual_stages=virtual)
        for stage, one in enumerate(copies)
    ]
    run_chunks(parts, **CASES[name].call())
    give_back(parts)
    expected = everything(original)
    for model, before in zip(copies, objects, strict=True):
        now = dict(model.named_modules())
        assert list(now) == list(before)
        assert all(now[key] is before[key] for key in now)
        found = everything(model)
        assert list(found) == list(expected)
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key])
            assert type(tensor) is type(expected[key])
            assert tensor.requires_grad == expected[key].requires_grad
            assert tensor.stride() == expected[key].stride()
    assert all(part.released() == [] for part in parts)


def test_what_a_stage_held_is_never_replaced() -> None:
    model = toys.Toy()
    own = everything(model.blocks[0])
    part = partition_model(model, 2, stage=0, points=[2])
    list(part.materialize("cpu"))
    part.restore()
    assert all(tensor is own[key] for key, tensor in everything(model.blocks[0]).items())


def test_restoring_without_the_weights() -> None:
    model = toys.Toy()
    part = partition_model(model, 2, stage=0, points=[2])
    part.restore()
    part.restore()
    assert [block.linear.weight.is_meta for block in model.blocks] == [False] * 2 + [True] * 3


def test_frozen_and_half_precision_weights() -> None:
    model = toys.Toy().to(torch.bfloat16).requires_grad_(False)
    parts = all_stages(model, 2)
    give_back(parts)
    for part in parts:
        for key, tensor in everything(part.model).items():
            assert torch.equal(tensor, everything(model)[key])
            assert tensor.dtype is torch.bfloat16
            assert not tensor.requires_grad


def test_models_without_weights_yet() -> None:
    """Each stage loads its own; shapes alone promise the bytes."""
    with torch.device("meta"):
        model = flux()
    part = partition_model(model, 2, stage=0)
    assert part.parameter_bytes == 0
    assert part.promised_bytes(0) > 0
    source = randomised(flux)
    weights = {key: source.state_dict()[key] for key in model.state_dict()}
    model.load_state_dict(weights, assign=True, strict=True)
    assert part.parameter_bytes == part.promised_bytes(0)


def test_weights_shared_within_a_stage_stay_shared() -> None:
    model = toys.Toy()
    model.blocks[3].linear = model.blocks[2].linear
    model.blocks[4].linear.weight = model.blocks[2].linear.weight
    x = toys.toy_input()
    with torch.no_grad():
        expected = model(x)
        parts = all_stages(model, 2, points=[2])
        assert torch.equal(run_chunks(parts, x), expected)
        assert parts[0].promised_bytes(1) == parts[1].parameter_bytes
        give_back(parts)
        for part in parts:
            blocks = part.model.blocks
            assert blocks[3].linear is blocks[2].linear
            assert blocks[4].linear.weight is blocks[2].linear.weight
            assert torch.equal(part.model(x), expected)


def test_weights_shared_with_what_every_stage_holds() -> None:
    """And buffers that all blocks share, such as tables of positions."""
    model = toys.Toy()
    model.extra = nn.Linear(8, 8)
    model.blocks[4].linear = model.extra
    for block in model.blocks:
        block.shift = model.blocks[0].shift
    x = toys.toy_input()
    with torch.no_grad():
        expected = model(x)
        parts = all_stages(model, 2, points=[2])
        assert not parts[0].model.extra.weight.is_meta
        assert parts[0].parameter_bytes == parts[0].promised_bytes(0)
        assert torch.equal(run_chunks(parts, x), expected)
        give_back(parts)
        for part in parts:
            assert part.model.blocks[4].linear is part.model.extra
            assert part.model.blocks[4].shift is part.model.blocks[0].shift
            assert torch.equal(part.model(x), expected)


def test_weights_shared_over_a_cut() -> None:
    model = toys.Toy()
    model.blocks[3].linear.weight = model.blocks[1].linear.weight
    before = everything(model)
    with pytest.raises(ParallelConfigError) as caught:
        partition_model(model, 2, stage=0, points=[3])
    assert str(caught.value) == (
        "cut at 3 of 5 blocks: blocks.1 and blocks.3 would be on stages 0 and 1, and share the "
        "parameter 'linear.weight'; nearest cuts through no shared parameter: 1, 4"
    )
    now = everything(model)
    assert all(now[key] is before[key] for key in before)
    assert partition_model(model, 2, stage=0, points=[4]).boundaries == (0, 4, 5)


def test_weights_shared_by_chunks_of_one_stage() -> None:
    model = toys.Toy()
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    parts = all_stages(model, 2, virtual_stages=2, points=[1, 2, 4])
    x = toys.toy_input()
    with torch.no_grad():
        assert torch.equal(run_chunks(parts, x), model(x))


def test_one_block_in_many_places() -> None:
    model = toys.Toy()
    model.blocks = nn.ModuleList([model.blocks[0]] * 4)
    with pytest.raises(ParallelConfigError, match=r"nearest cuts .*: none"):
        partition_model(model, 2, stage=0)
    x = toys.toy_input()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(run_chunks(all_stages(model, 1, virtual_stages=2), x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 6}, "has 5 blocks, .* 6 stages .*; largest legal: 5 stages"),
        (
            {"virtual_stages": 3},
            "2 stages of virtual_stages=3 chunks .*; largest legal: 1 stage or virtual_stages=2",
        ),
        ({"virtual_stages": 0}, "virtual_stages=0; legal: 1 and more"),
        ({"stages": 0}, "stages=0; legal: 1 and more"),
        ({"stage": 2}, "stage=2 of 2 stages; legal: 0 to 1"),
        ({"stage": -1}, "stage=-1 of 2 stages; legal: 0 to 1"),
        ({"points": [0]}, r"points=\(0,\) .* legal: 1 rising numbers from 1 to 4, such as"),
        ({"points": [5]}, r"points=\(5,\) do not cut 5 blocks into 2 chunks"),
        ({"points": [2, 3]}, "legal: 1 rising numbers"),
        ({"points": [3, 2, 4], "virtual_stages": 2}, "legal: 3 rising numbers"),
        ({"points": []}, "legal: 1 rising numbers"),
        ({"balance": "size"}, "balance='size'; legal: 'count', 'cost', or a cost for each"),
        ({"balance": [1.0, 2.0]}, "gives 2 costs for 5 blocks"),
        ({"balance": [1.0, -2.0, 1.0, 1.0, 1.0]}, "cost of block 1 is -2.0"),
        ({"block_lists": ["layers"]}, "no list of blocks 'layers'"),
        ({"block_lists": "blocks"}, r"block_lists='blocks' is one name; .*\('blocks',\)"),
        ({"stages": 2.0}, "stages=2.0; legal: 1 and more, whole numbers"),
        ({"stages": "2"}, "stages='2'; legal: 1 and more"),
        ({"stage": "0"}, "stage='0' of 2 stages; legal: 0 to 1"),
        ({"points": [2.5]}, r"points=\(2.5,\) do not cut 5 blocks"),
        ({"balance": 1.0}, "balance=1.0; legal: 'count', 'cost', or a cost for each"),
        ({"balance": ["a"] * 5}, "legal: a number for each block, not all of them zero"),
        ({"balance": [0.0] * 5}, "legal: a number for each block, not all of them zero"),
    ],
)
def test_requests_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    model = toys.Toy()
    before, tensors = dict(model.named_modules()), everything(model)
    with pytest.raises(ParallelConfigError, match=message):
        partition_model(model, **{"stages": 2, "stage": 0} | options)
    assert dict(model.named_modules()) == before
    assert all(tensor is tensors[key] for key, tensor in everything(model).items())


def test_cutting_twice() -> None:
    model = toys.Toy()
    part = partition_model(model, 2, stage=0)
    with pytest.raises(ParallelConfigError, match="cut into stages already"):
        partition_model(model, 2, stage=0)
    list(part.materialize("cpu"))
    part.restore()
    assert partition_model(model, 5, stage=0).boundaries == (0, 1, 2, 3, 4, 5)


def test_weights_that_ranks_share_are_refused_by_name() -> None:
    model = toys.Toy()
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    local = model.blocks[3].linear.weight.detach()
    shared = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    model.blocks[3].linear.weight = nn.Parameter(shared)
    before = everything(model)
    with pytest.raises(ParallelConfigError) as caught:
        partition_model(model, 2, stage=0)
    text = str(caught.value)
    assert "Toy cannot be cut into stages while ranks share its weights" in text
    assert "(blocks.3.linear.weight is distributed)" in text
    assert "Legal: remove_hsdp(), cut it first, and then shard" in text
    assert all(tensor is before[key] for key, tensor in everything(model).items())


def test_one_stage_is_the_model() -> None:
    model = randomised(flux)
    part = partition_model(model, 1, stage=0)
    with torch.no_grad():
        expected = model(**flux_call())
        found = part.chunks[0].run(model, (), flux_call(), None, None)
    assert torch.equal(found.sample, expected.sample)
    assert part.released() == []


def test_moving_the_model_leaves_the_others_where_they_are() -> None:
    """A model with weights on meta among its children could not be moved."""
    part = partition_model(toys.Toy(), 2, stage=0)
    part.model.to(torch.float64)
    part.model._apply(lambda tensor: tensor.cpu())
    assert all(one.dtype is torch.float64 for one in part.model.parameters())
