"""When weights are gathered, and when they are given up."""

from __future__ import annotations

import pytest
import torch
from gather_events import events_of, held, stairs
from toy_sharded import config, seeded, sharing

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import (
    GatherPolicy,
    apply_hsdp_to_model,
    choose_policy,
    gathered,
    release,
    set_policy,
)
from omni_hsdp.gather_policy import peak_bytes, policy_for


def calls(policy, count, reshard_after_forward=True, changes=()):
    """Events of some calls, what is held after each, and whether each is right."""
    model, x = stairs(), seeded(2, 4)
    found = []
    with sharing(2):
        order = list(changes)
        settings = config(reshard_after_forward=reshard_after_forward)
        reference = stairs()
        apply_hsdp_to_model(model, settings, policy=policy)
        for number in range(count):
            model.order = reference.order = order[number] if order else model.order
            with events_of(model, 2) as events:
                right = torch.equal(model(x), reference(x))
            found.append((" ".join(events), held(model), right))
    return found


def both(ranks, *args, **kwargs):
    found = ranks.run(calls, *args, world_size=2, **kwargs)
    assert found[0] == found[1]
    return found[0]


# What torch gathers in a call stands before the block's own events; what is gathered ahead, after.
@pytest.mark.parametrize(
    ("prefetch", "events"),
    [
        (0, "g c0 g0 c1 g1 c2 g2 c3 g3"),
        (1, "g c0 g0 g1 c1 g2 c2 g3 c3"),
        (2, "g c0 g0 g1 g2 c1 g3 c2 c3"),
        (9, "g c0 g0 g1 g2 g3 c1 c2 c3"),
    ],
)
def test_the_next_blocks_are_gathered_while_one_computes(ranks, prefetch, events):
    assert both(ranks, GatherPolicy(prefetch), 2) == [(events, "", True)] * 2


def test_one_block_is_gathered_ahead_unless_said_otherwise(ranks):
    assert both(ranks, None, 1) == [("g c0 g0 g1 c1 g2 c2 g3 c3", "", True)]


def test_the_order_is_that_of_the_call_before(ranks):
    backwards = [3, 2, 1, 0]
    assert both(ranks, GatherPolicy(1), 3, changes=[backwards] * 3) == [
        ("g c3 g3 c2 g2 c1 g1 c0 g0", "", True),
        ("g c3 g3 g2 c2 g1 c1 g0 c0", "", True),
        ("g c3 g3 g2 c2 g1 c1 g0 c0", "", True),
    ]


def test_blocks_that_are_skipped_are_given_up_again(ranks):
    every, some = [0, 1, 2, 3], [0, 2]
    assert both(ranks, GatherPolicy(1), 4, changes=[every, some, some, every]) == [
        ("g c0 g0 g1 c1 g2 c2 g3 c3", "", True),
        ("g c0 g0 g1 c2 g2 g3", "", True),
        ("g c0 g0 g2 c2", "", True),
        ("g c0 g0 g2 c1 g1 c2 c3 g3", "", True),
    ]


def test_the_last_block_is_kept(ranks):
    assert both(ranks, GatherPolicy(1, "last"), 3) == [
        ("g c0 g0 g1 c1 g2 c2 g3 c3", "", True),
        ("g c0 g0 g1 c1 g2 c2 g3 c3", "3", True),
        ("g c0 g0 g1 c1 g2 c2 c3", "3", True),
    ]


@pytest.mark.parametrize("policy", [GatherPolicy(1, "all"), None], ids=["policy", "config"])
def test_everything_is_kept(ranks, policy):
    assert both(ranks, policy, 3, reshard_after_forward=policy is not None) == [
        ("g c0 g0 g1 c1 g2 c2 g3 c3", "0123", True),
        ("c0 c1 c2 c3", "0123", True),
        ("c0 c1 c2 c3", "0123", True),
    ]


def gather_once(keep):
    model, x = stairs(), seeded(2, 4)
    with sharing(2):
        expected = model(x)
        apply_hsdp_to_model(model, config(), policy=GatherPolicy(keep=keep))
        with events_of(model, 2) as events:
            with gathered(model) as same:
                assert same is model
                inside = held(model)
                right = [torch.equal(model(x), expected) for _ in range(2)]
                with gathered(model):
                    right.append(torch.equal(model(x), expected))
                right.append(held(model) == "0123")
                with pytest.raises(ParallelConfigError, match="inside gathered"):
                    release(model)
            after = held(model)
            events.append("|")
            right.append(torch.equal(model(x), expected))
        return inside, after, right, " ".join(events), held(model)


@pytest.mark.parametrize(("keep", "kept"), [("none", ""), ("last", ""), ("all", "0123")])
def test_a_request_gathers_once_and_gives_up_at_its_end(ranks, keep, kept):
    for inside, after, right, events, later in ranks.run(gather_once, keep, world_size=2):
        assert later == kept
        assert inside == "0123"
        assert after == ""
        assert right == [True] * 5
        once = "g g0 g1 g2 g3" + " c0 c1 c2 c3" * 3
        assert events == f"{once} | g c0 g0 g1 c1 g2 c2 g3 c3"


def change_policy():
    model, x = stairs(), seeded(2, 4)
    found = []
    with sharing(2):
        apply_hsdp_to_model(model, config())
        for policy in (GatherPolicy(keep="all"), GatherPolicy(0)):
            set_policy(model, policy)
            with events_of(model, 2) as events:
                model(x), model(x)
            found.append((" ".join(events), held(model)))
        set_policy(model, GatherPolicy(keep="all"))
        model(x)
        release(model)
        found.append(held(model))
        with pytest.raises(ParallelConfigError, match="cpu_offload"):
            set_policy(model, GatherPolicy(cpu_offload=True))
    return found


def test_the_policy_can_be_changed_and_kept_weights_given_up(ranks):
    expected = [
        ("g c0 g0 g1 c1 g2 c2 g3 c3 c0 c1 c2 c3", "0123"),
        (" ".join(["g c0 g0 c1 g1 c2 g2 c3 g3"] * 2), ""),
        "",
    ]
    assert ranks.run(change_policy, world_size=2) == [expected] * 2


def choose(frees):
    import torch.distributed as dist

    model = stairs()
    with sharing(2):
        apply_hsdp_to_model(model, config())
        return [choose_policy(model, free_bytes=free[dist.get_rank()]) for free in frees]


def test_the_rank_with_least_memory_decides(ranks):
    frees = [(10**6, 10**6), (10**6, 3000), (3000, 10**6), (0, 0)]
    policies = ranks.run(choose, frees, world_size=2)
    assert policies[0] == policies[1]
    assert [(p.keep, p.prefetch) for p in policies[0]] == [
        ("all", 1),
        ("none", 2),
        ("none", 2),
        ("none", 1),
    ]


def automatic():
    model, x = stairs(), seeded(2, 4)
    with sharing(2):
        expected = model(x)
        apply_hsdp_to_model(model, config(), policy="auto")
        return torch.equal(model(x), expected), held(model)


def test_a_small_model_is_kept_gathered_automatically(ranks):
    assert ranks.run(automatic, world_size=2) == [(True, "0123")] * 2


def test_a_policy_fits_the_free_memory():
    blocks = [100] * 10
    assert policy_for(4000, 50, blocks) == GatherPolicy(keep="all")
    assert policy_for(1000, 50, blocks) == GatherPolicy(prefetch=2)
    assert policy_for(400, 50, blocks) == GatherPolicy(prefetch=1)


def test_gathering_one_block_ahead_takes_no_more_than_gathering_none():
    assert peak_bytes(50, [100] * 10, 0) == peak_bytes(50, [100] * 10, 1) == 250
    assert peak_bytes(50, [100] * 10, 2) == 350
    assert peak_bytes(50, [], 2) == 100


@pytest.mark.parametrize("bad", [{"prefetch": -1}, {"prefetch": 1.5}, {"keep": "some"}])
def test_bad_policies(bad):
    with pytest.raises(ParallelConfigError, match="legal"):
        GatherPolicy(**bad)
    with sharing(1), pytest.raises(ParallelConfigError, match="legal"):
        apply_hsdp_to_model(stairs(), config(), policy="fast")
