"""Calls in odd ways: of blocks alone, of blocks in blocks, with policies set by name."""

from __future__ import annotations

import pytest
import torch
from toy_sharded import config, equal, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import GatherPolicy, apply_hsdp_to_model, gathered, hsdp_report, set_policy

POLICIES = [GatherPolicy(0), GatherPolicy(2), GatherPolicy(1, "last"), GatherPolicy(1, "all")]


def block_alone(policy, inference):
    """A block before the first call of its model, between calls, and in `gathered`."""
    with sharing(2), torch.inference_mode(inference):
        x, reference = seeded(2, 6), toy()
        model = apply_hsdp_to_model(toy(), config(), policy=policy)
        found = []

        def compare(number):
            found.append(equal(model.blocks[number](x), reference.blocks[number](x)))

        compare(1)
        for number in (0, 1, 2):
            found.append(equal(model(x), reference(x)))
            compare(number)
        with gathered(model):
            compare(0)
        found.append(equal(model(x), reference(x)))
        return found


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_a_block_may_be_called_alone(ranks, policy, inference):
    assert ranks.run(block_alone, policy, inference, world_size=2) == [[True] * 9] * 2


def blocks_in_blocks(conditions):
    with sharing(2):
        x, expected, found = seeded(2, 6), toy()(seeded(2, 6)), []
        model = apply_hsdp_to_model(toy(), config(), conditions=conditions)
        for policy in POLICIES:
            set_policy(model, policy)
            found += [equal(model(x), expected) for _ in range(3)]
        with gathered(model):
            found.append(equal(model(x), expected))
        return all(found), list(hsdp_report(model).blocks)


@pytest.mark.parametrize(
    ("conditions", "blocks"),
    [
        (["blocks.**"], [f"blocks.{i}{part}" for i in range(3) for part in ("", ".up", ".down")]),
        (["**.up", "blocks.*"], [f"blocks.{i}{part}" for i in range(3) for part in ("", ".up")]),
    ],
    ids=["blocks.**", "**.up"],
)
def test_blocks_may_lie_in_blocks(ranks, conditions, blocks):
    assert ranks.run(blocks_in_blocks, conditions, world_size=2) == [(True, ["", *blocks])] * 2


def policies():
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config(), policy=GatherPolicy(0))
        set_policy(model, "auto")
        for policy in (None, "all", 2):
            with pytest.raises(ParallelConfigError, match="legal: a GatherPolicy, or 'auto'"):
                set_policy(model, policy)
        report = hsdp_report(model)
        right = equal(model(seeded(2, 6)), toy()(seeded(2, 6)))
        return right, report.gathered_peak == sum(report.blocks.values())


def test_policies_set_by_name(ranks):
    assert ranks.run(policies, world_size=2) == [(True, True)] * 2
