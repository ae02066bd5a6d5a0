"""Trees of tensors between stages: structure at the first use only, and failures in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_results import same
from toy_stages import seeded

from omni_group_coordinator import RankMismatchError, record_traffic
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp.stages.stage_link import StageLink
from rank_harness import RankPool


def link_of(world: int) -> tuple[Any, StageLink]:
    group = ParallelState(ParallelLayout(pp=world)).pp
    return group, StageLink(group)


def tree(seed: int) -> Any:
    half = seeded(2, 3, seed=seed).half()
    return (seeded(4, seed=seed), None, {"a": half, "b": [seeded(2, 2, seed=seed).mT, 3]})


def send_trees() -> list[int]:
    group, link = link_of(2)
    metadata = []
    for seed in range(4):
        with record_traffic() as traffic:
            if group.rank_in_group == 0:
                link.send("x", tree(seed), 1)
            else:
                arrival = link.expect("x", 0, reuse=True)
                assert arrival.wait()
                same(arrival.value(), tree(seed))
                arrival.release(None)
            link.finish()
        metadata.append(traffic.calls["metadata"])
        if group.rank_in_group == 0:
            assert traffic.bytes_sent["send channel"] == 4 * 4 + 6 * 2 + 4 * 4 + 1
    return metadata


def test_structure_travels_at_the_first_use_only(ranks: RankPool) -> None:
    sender, receiver = ranks.run(send_trees, world_size=2)
    assert sender[0] > 0
    assert sender[1:] == [0, 0, 0]
    assert receiver == [0] * 4


def reuse_buffers() -> None:
    group, link = link_of(2)
    me = group.rank_in_group
    if me == 0:
        for seed in range(6):
            link.send("x", (seeded(3, seed=seed),), 1)
        link.finish()
        return
    places, held = [], []
    for seed in range(4):
        arrival = link.expect("x", 0, reuse=True)
        arrival.wait()
        (found,) = arrival.value()
        assert torch.equal(found, seeded(3, seed=seed))
        places.append(found.data_ptr())
        if seed < 2:  # both slots are taken then
            held.append(arrival)
        if seed == 2:
            held[0].release(None)
            arrival.release(None)
    assert len({*places[:3]}) == 3
    assert places[3] == places[0]
    kept = link.expect("x", 0, reuse=False)
    kept.wait()
    (value,) = kept.value()
    last = link.expect("x", 0, reuse=True)
    last.wait()
    assert value.data_ptr() not in places
    assert torch.equal(value, seeded(3, seed=4))


def test_received_tensors_are_reused_once_released(ranks: RankPool) -> None:
    ranks.run(reuse_buffers)


def pass_on() -> Any:
    """The middle rank hands on what it received, as it came, and goes on receiving."""
    group, link = link_of(3)
    me = group.rank_in_group
    found = []
    for seed in range(8):
        if me == 0:
            link.send("x", (seeded(50_000, seed=seed),), 1)
        elif me == 1:
            arrival = link.expect("x", 0, reuse=True)
            arrival.wait()
            arrival.release(link.send("y", arrival.value(), 2, arrival.status))
    if me == 2:
        for _ in range(8):
            arrival = link.expect("y", 1, reuse=False)
            arrival.wait()
            found.append(arrival.value()[0])
    link.finish()
    return [torch.equal(one, seeded(50_000, seed=seed)) for seed, one in enumerate(found)]


def test_what_is_handed_on_as_it_came_is_not_overwritten(ranks: RankPool) -> None:
    *_, last = ranks.run(pass_on, world_size=3)
    assert last == [True] * 8


def fail_first_and_later() -> list[bool]:
    group, link = link_of(2)
    there = []
    for works in (False, True, False, True):
        if group.rank_in_group == 0:
            if works:
                link.send("x", (seeded(3), 1), 1)
            else:
                link.send_failure("x", 1)
        else:
            arrival = link.expect("x", 0, reuse=True)
            there.append(arrival.wait())
            if there[-1]:
                assert torch.equal(arrival.value()[0], seeded(3))
            arrival.release(None)
        link.finish()
    return there


def test_a_failure_travels_in_the_place_of_a_tree(ranks: RankPool) -> None:
    _, there = ranks.run(fail_first_and_later)
    assert there == [False, True, False, True]


def send_other_shapes() -> None:
    group, link = link_of(2)
    if group.rank_in_group == 0:
        link.send("x", (seeded(3),), 1)
        with pytest.raises(RankMismatchError, match=r"a stage gave \[float32 \(3,\)\] in"):
            link.send("x", (seeded(4),), 1)
        with pytest.raises(
            RankMismatchError, match=r"and \[float32 \(3,\)\] in list\(tensor\) now"
        ):
            link.send("x", [seeded(3)], 1)
    else:
        link.expect("x", 0, reuse=True).wait()
    link.finish()


def test_a_stream_keeps_its_shapes(ranks: RankPool) -> None:
    ranks.run(send_other_shapes)
