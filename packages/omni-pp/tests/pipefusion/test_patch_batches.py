"""Which calls of a request are cut into patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_pp.pipefusion import PipeFusionConfig
from omni_pp.pipefusion.patch_batches import PatchBatches
from omni_pp.pipefusion.request_clock import RequestClock

LENGTH = 7


class StandIn:
    """What is asked of a denoiser."""

    name = "transformer"
    parameters = ("hidden_states",)

    def count(self, args: Any, kwargs: Any) -> tuple[int, int]:
        return int(args[0].shape[1]), 0

    def layout(self, *_: Any) -> None:
        """As of a model that needs the whole image."""

    def around(self, *_: Any) -> None:
        raise AssertionError


class Requests:
    """Cuts calls, and makes steps between them."""

    def __init__(self, **options: Any) -> None:
        alone = ParallelState(ParallelLayout())
        self.clock = RequestClock()
        self.batches = PatchBatches(PipeFusionConfig(**options), self.clock, alone.sp)
        self.denoiser: Any = StandIn()
        self.batches.denoisers["transformer"] = self.denoiser
        self.clock.begin()

    def step(self, *lengths: int) -> list[int]:
        """Pieces of each call of a step, given by its length; then the scheduler's step."""
        found = [self.batches.cut(self.denoiser, (torch.zeros(1, n, 2),), {}) for n in lengths]
        self.clock.tick()
        return [len(division.pieces) for division in found]


def test_exact_steps_come_first_in_each_request() -> None:
    run = Requests(patches=3, warmup_steps=2)
    for _ in range(2):
        run.clock.begin()
        assert [run.step(LENGTH, LENGTH) for _ in range(4)] == [[1, 1], [1, 1], [3, 3], [3, 3]]


def test_a_step_of_another_shape_is_exact() -> None:
    run = Requests(patches=2)
    assert [run.step(n) for n in (7, 7, 9, 9, 7, 7)] == [[1], [2], [1], [2], [1], [2]]


def test_a_branch_that_was_left_out_is_exact_again() -> None:
    run = Requests(patches=2)
    calls = [(7, 7), (7, 7), (7,), (7, 7), (7, 7)]
    assert [run.step(*one) for one in calls] == [[1, 1], [2, 2], [2], [2, 1], [2, 2]]


def test_steps_of_a_scheduler_without_a_call_count_once() -> None:
    run = Requests(patches=2)
    assert run.step(7) == [1]
    run.clock.tick()
    assert run.step(7) == [2]


def test_pieces_share_the_tokens_evenly_and_in_order() -> None:
    run = Requests(patches=3)
    run.step(LENGTH)
    division = run.batches.cut(run.denoiser, (torch.zeros(1, LENGTH, 2),), {})
    views = [piece.around.args[0] for piece in division.pieces]  # type: ignore[union-attr]
    assert [(view.start, view.stop) for view in views] == [(0, 3), (3, 5), (5, 7)]
    assert [piece.is_partial for piece in division.pieces] == [True, True, False]


def test_more_patches_than_tokens() -> None:
    run = Requests(patches=8)
    with pytest.raises(ParallelConfigError, match=r"7 image tokens.*patches=8; legal here: 1 to 7"):
        run.step(LENGTH)


def test_the_scheduler_keeps_its_parameters_and_its_copies_count_nothing() -> None:
    import copy
    import inspect

    class Scheduler:
        def step(self, prediction: int, generator: object = None) -> int:
            return prediction + 1

    clock, scheduler = RequestClock(), Scheduler()
    undo = clock.watch(scheduler)
    assert "generator" in inspect.signature(scheduler.step).parameters
    twin = copy.deepcopy(scheduler)
    clock.branch("transformer")
    assert twin.step(1) == 2
    assert clock.step == 0
    assert scheduler.step(1) == 2
    assert clock.step == 1
    undo()
    assert type(scheduler) is Scheduler
