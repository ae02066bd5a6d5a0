"""The messages between stages: how many, of which size, and that each is waited for."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from toy_staged_pipelines import (
    WIDTH,
    Ends,
    Loop,
    Staged,
    Transformer,
    TwoAtOnce,
    alone,
    in_stages,
    seeded,
    state_of,
)

from omni_cfgp import CFGParallelMixin
from omni_group_coordinator import record_traffic
from omni_parallel_state import ParallelLayout, ParallelState


def traffic() -> Any:
    """Of a request of shapes that are known: what each rank sends in five steps."""
    pipeline = Staged()
    pipeline.diffuse(steps=1)
    with record_traffic() as one:
        pipeline.diffuse(steps=1)
    with record_traffic() as many:
        pipeline.diffuse(steps=6)
    metadata = [recorded.calls["metadata"] for recorded in (one, many)]
    sent = [recorded.bytes_sent["send channel"] for recorded in (one, many)]
    return metadata[1] - metadata[0], sent[1] - sent[0]


def test_steps_send_no_metadata_and_the_bytes_of_their_tensors(ranks: Any) -> None:
    flow = sum((6 + text) * WIDTH * 4 + 1 for text in (4, 7))
    latents = 2 * (6 * WIDTH * 4 + 1 + 1)  # to two stages, with a status, after a word
    found = ranks.run(in_stages, 3, 1, traffic, world_size=3)
    assert found == [(0, 5 * flow), (0, 5 * flow), (0, 5 * latents)]


class Dropping(Staged):
    """Never looks at the latents of a step."""

    def diffuse(self, steps: int = 3) -> str:  # type: ignore[override]
        for t in torch.linspace(1.0, 0.2, steps):
            latents = seeded(1, 6, WIDTH)
            found = self.predicted(latents, self.prompts((4, 7)), t, {})
            self.scheduler_step_maybe_with_cfg(found, t, latents, True)
        return "done"


def handles() -> Any:
    """How often each message was waited for, of all that were posted."""
    from omni_group_coordinator.pending_work import PendingWork

    made: list[PendingWork] = []
    waits: list[int] = []
    make, wait = PendingWork.__init__, PendingWork.wait

    def made_one(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        make(self, *args, **options)

    def waited(self: Any) -> None:
        waits.append(id(self))
        wait(self)

    PendingWork.__init__, PendingWork.wait = made_one, waited  # type: ignore[method-assign]
    try:
        for pipeline in (Dropping(), Staged(), Ends()):
            pipeline.diffuse()
            assert all(work.is_completed() for work in made)
    finally:
        PendingWork.__init__, PendingWork.wait = make, wait  # type: ignore[method-assign]
    return len(made), len(set(waits))


@pytest.mark.parametrize("pp", [2, 3])
def test_every_message_is_waited_for(ranks: Any, pp: int) -> None:
    for made, waited in ranks.run(in_stages, pp, 1, handles, world_size=pp):
        assert made > 20
        assert waited == made


class TwoAtOnceAlone(Loop, CFGParallelMixin):
    diffuse = TwoAtOnce.diffuse.__wrapped__  # type: ignore[attr-defined]


def two_at_once() -> Any:
    pipeline = TwoAtOnce()
    return [pipeline.diffuse() for _ in range(2)]


@pytest.mark.parametrize("pp", [2, 3])
def test_predictions_and_steps_come_in_any_order(ranks: Any, pp: int) -> None:
    with ParallelState(ParallelLayout()).use():
        latents, (sound,) = TwoAtOnceAlone().diffuse()
    for found in ranks.run(in_stages, pp, 1, two_at_once, world_size=pp):
        for one, (other,) in found:
            assert torch.equal(one, latents)
            assert torch.equal(other, sound)


def two_pipelines() -> Any:
    """Whose flows have one name, and other structures."""
    pipelines = [Staged(Transformer(flow)) for flow in ("dict", "tuple", "tensor")]
    return [pipeline.diffuse()["latents"] for pipeline in (*pipelines, *pipelines)]


def test_pipelines_of_one_process_know_nothing_of_each_other(ranks: Any) -> None:
    expected = alone((4, 7))["latents"]
    for found in ranks.run(in_stages, 2, 1, two_pipelines):
        assert all(torch.equal(one, expected) for one in found)


def forgotten() -> bool:
    state = state_of(2)
    with state.use():
        Staged().diffuse()
    gone = weakref.ref(state.pp)
    state.destroy()
    del state
    gc.collect()
    return gone() is None


def test_groups_are_let_go(ranks: Any) -> None:
    assert ranks.run(forgotten) == [True] * 2
