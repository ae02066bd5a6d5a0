"""Adapters that are put on, fused, taken off and switched after a model was sharded."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from toy_sharded import config, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import GatherPolicy, apply_hsdp_to_model, gathered, release, remove_hsdp


class Adapter(nn.Module):
    """Low-rank adapters around a linear layer, made and fused as peft does it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.downs, self.ups = nn.ModuleDict(), nn.ModuleDict()
        self.active = ""

    def add(self, name: str, seed: int, rank: int = 2) -> None:
        base = self.base_layer
        device, dtype = base.weight.device, base.weight.dtype
        self.downs[name] = nn.Linear(base.in_features, rank, False, device, dtype)
        self.ups[name] = nn.Linear(rank, base.out_features, False, device, dtype)
        for number, layer in enumerate((self.downs[name], self.ups[name])):
            layer.weight.data = seeded(*layer.weight.shape, seed=seed + number)
        self.active = name

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out + self.ups[self.active](self.downs[self.active](x)) if self.active else out

    def delta(self) -> Tensor:
        return self.ups[self.active].weight @ self.downs[self.active].weight

    def fuse(self, in_place: bool) -> None:
        weight = self.base_layer.weight
        if in_place:
            weight.data += self.delta()
        else:
            weight.data = weight.data + self.delta()
        self.active = ""

    def unfuse(self, name: str) -> None:
        self.active = name
        self.base_layer.weight.data -= self.delta()
        self.active = ""


def inject(model: nn.Module) -> list[Adapter]:
    adapters = []
    for block in model.blocks:
        block.up = Adapter(block.up)
        adapters.append(block.up)
    model.head = Adapter(model.head)
    return [*adapters, model.head]


def take_off(model: nn.Module) -> None:
    for block in model.blocks:
        block.up = block.up.base_layer
    model.head = model.head.base_layer


def life_of(model: nn.Module, sharded: bool, in_place: bool) -> list[Tensor]:
    """Outputs over the life of two adapters."""
    changing = (lambda: gathered(model, write=True)) if sharded else nullcontext
    x, outputs = seeded(2, 6), []

    def note() -> None:
        outputs.append(model(x))

    note()
    adapters = inject(model)
    for number, adapter in enumerate(adapters):
        adapter.add("one", seed=number)
        adapter.add("two", seed=50 + number)
    note()
    for adapter in adapters:
        adapter.active = "one"
    note()
    with changing():
        for adapter in adapters:
            adapter.fuse(in_place)
        note()
    note()
    note()
    for adapter in adapters:
        adapter.active = "two"
    note()
    with changing():
        for adapter in adapters:
            adapter.unfuse("one")
    note()
    take_off(model)
    note()
    return outputs


def both_lives(in_place, keep):
    plain, model = toy(), toy()
    with sharing(2):
        expected = life_of(plain, False, in_place)
        apply_hsdp_to_model(model, config(), policy=GatherPolicy(keep=keep))
        found = life_of(model, True, in_place)
        release(model)
        still = all(isinstance(p, DTensor) for p in model.parameters())
        remove_hsdp(model)
        pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        rest = all(torch.equal(a, b) for a, b in pairs)
        different = len({tuple(out.flatten().tolist()) for out in expected})
        matches = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        return matches, still, rest, different


@pytest.mark.parametrize("keep", ["none", "last", "all"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "by new data"])
def test_adapters_act_as_on_one_rank(ranks, in_place, keep):
    for matches, still, rest, different in ranks.run(both_lives, in_place, keep, world_size=2):
        assert matches == [True] * 9
        assert still
        assert rest
        assert different >= 5


def new_parameter():
    """Fused by another parameter object in the place of the gathered one."""
    plain, model, x = toy(), toy(), seeded(2, 6)
    with sharing(2):
        apply_hsdp_to_model(model, config())
        for each in (plain, model):
            with gathered(model, write=True):
                layer = each.blocks[1].up
                layer.weight = nn.Parameter(layer.weight.data * 3, requires_grad=False)
        return [torch.equal(model(x), plain(x)) for _ in range(2)]


def memory_after_new_data():
    model = toy()
    with sharing(2):
        apply_hsdp_to_model(model, config())
        with gathered(model, write=True):
            weight = model.blocks[1].up.weight
            weight.data = weight.data * 3
        return weight.untyped_storage().nbytes()


def test_memory_of_new_data_is_given_up(ranks):
    assert ranks.run(memory_after_new_data, world_size=2) == [0, 0]


def test_a_parameter_that_takes_the_place_of_a_gathered_one_is_kept(ranks):
    assert ranks.run(new_parameter, world_size=2) == [[True, True]] * 2


def changes_that_are_not_kept():
    model, x = toy(), seeded(2, 6)
    with sharing(2):
        expected = model(x)
        apply_hsdp_to_model(model, config())
        with gathered(model):
            model.blocks[0].up.weight.data *= 2
        with gathered(model), pytest.raises(ParallelConfigError, match="outer"):
            gathered(model, write=True).__enter__()
        with suppress(KeyError), gathered(model, write=True):
            model.blocks[0].up.weight.data *= 2
            raise KeyError
        return torch.equal(model(x), expected)


def test_without_writing_or_after_an_error_changes_are_lost(ranks):
    assert ranks.run(changes_that_are_not_kept, world_size=2) == [True, True]


def write_cast():
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config(param_dtype=torch.bfloat16))
        with pytest.raises(ParallelConfigError, match="param_dtype=None"):
            gathered(model, write=True).__enter__()


def test_cast_weights_are_not_written(ranks):
    ranks.run(write_cast, world_size=2)
