"""Where blocks are cut."""

from __future__ import annotations

import time
from itertools import combinations, pairwise

import partition_toys as toys
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_case import randomised
from partition_images import flux, flux_call
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition import cut_blocks, measure_block_costs, partition_model
from omni_pp.partition.balance import parameter_costs


def sums(costs: list[float], boundaries: tuple[int, ...]) -> list[float]:
    return [sum(costs[start:end]) for start, end in pairwise(boundaries)]


@settings(deadline=None)  # the machine may be busy
@given(st.data())
def test_the_largest_part_is_as_small_as_it_can_be(data) -> None:
    costs = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    parts = data.draw(st.integers(1, len(costs)))
    found = cut_blocks(costs, parts)
    assert found[0] == 0
    assert found[-1] == len(costs)
    assert len(found) == parts + 1
    assert all(start < end for start, end in pairwise(found))
    every = [
        sums(costs, (0, *inner, len(costs)))
        for inner in combinations(range(1, len(costs)), parts - 1)
    ]
    smallest = min(map(max, every))
    even = min(sum(one**2 for one in each) for each in every if max(each) == smallest)
    assert max(sums(costs, found)) == smallest
    assert sum(one**2 for one in sums(costs, found)) == even


def test_examples() -> None:
    assert cut_blocks([1] * 6, 3) == (0, 2, 4, 6)
    assert cut_blocks([10, 1, 1, 1, 1], 3) == (0, 1, 3, 5)
    assert cut_blocks([0.1] * 57, 1) == (0, 57)
    assert len(cut_blocks([0.1 + i % 3 for i in range(60)], 16)) == 17


@pytest.mark.parametrize(("count", "parts"), [(3, 4), (3, 0), (0, 1)])
def test_parts_that_do_not_exist(count: int, parts: int) -> None:
    with pytest.raises(ParallelConfigError, match=f"{count} blocks cannot be cut into {parts}"):
        cut_blocks([1.0] * count, parts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_costs_that_are_none(bad: float) -> None:
    with pytest.raises(ParallelConfigError, match="cost of block 1"):
        cut_blocks([1.0, bad], 2)


def test_balances() -> None:
    """A double block of Flux has 2.4 times the matrices of a single one, for as many tokens."""

    def boundaries(**options) -> tuple[int, ...]:
        return partition_model(flux(4, 6), 2, stage=0, **options).boundaries

    assert boundaries(balance="count") == (0, 5, 10)
    assert boundaries() == boundaries(balance="cost") == (0, 5, 10)
    model = flux(4, 6)
    double, single = parameter_costs(
        [model.transformer_blocks[0], model.single_transformer_blocks[0]]
    )
    assert 0.9 < double / single < 1.1
    assert boundaries(balance=[1] * 9 + [9]) == (0, 9, 10)
    assert boundaries(balance="count", points=[7]) == (0, 7, 10)


def test_a_heavy_block_is_a_stage_of_its_own() -> None:
    model = toys.Toy(4)
    width = model.blocks[0].linear.in_features
    model.blocks[3].more = nn.Linear(width, 10 * width)
    assert partition_model(model, 2, stage=0).boundaries == (0, 3, 4)


def test_blocks_without_matrices() -> None:
    model = toys.Toy()
    for block in model.blocks:
        block.linear = nn.LayerNorm(8)
    assert partition_model(model, 5, stage=0).boundaries == (0, 1, 2, 3, 4, 5)


def test_only_matrices_count() -> None:
    model = toys.Toy(4)
    model.blocks[0].table = nn.Parameter(torch.ones(1000))
    assert partition_model(model, 2, stage=0).boundaries == (0, 2, 4)


def test_measured_costs() -> None:
    model = randomised(flux)
    call = flux_call()
    slow = model.transformer_blocks[1]
    slow.register_forward_hook(lambda *_: time.sleep(0.2))
    hooks = {id(one): len(one._forward_hooks) for one in model.modules()}
    with torch.no_grad():
        costs = measure_block_costs(model, lambda: model(**call))
    assert {id(one): len(one._forward_hooks) for one in model.modules()} == hooks
    assert len(costs) == 7
    assert min(costs) > 0
    assert costs[1] > 0.2 > max(costs[:1] + costs[2:])
    assert partition_model(model, 3, stage=0, balance=costs).boundaries[:3] == (0, 1, 2)


def test_measuring_a_call_that_does_not_arrive() -> None:
    model = toys.Toy()
    with pytest.raises(ParallelConfigError, match=r"did not reach 5 of 5 blocks, .* blocks.0"):
        measure_block_costs(model, lambda: model.embed(toys.toy_input()))
    with pytest.raises(RuntimeError, match="gone"):
        measure_block_costs(model, lambda: (_ for _ in ()).throw(RuntimeError("gone")))
    assert not any(one._forward_hooks for one in model.modules())
