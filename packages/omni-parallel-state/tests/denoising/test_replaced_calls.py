"""Calls of one object that are replaced, in layers."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from omni_parallel_state.denoising.replaced_calls import call_below, give_call, watch_scheduler


class Doubler:
    """Called with a number, it gives twice of it."""

    def __call__(self, value: int) -> int:
        return 2 * value


def layer(target: Any, name: str, log: list[str]) -> Any:
    below = call_below(target)

    def call(value: int) -> Any:
        log.append(name)
        return below(value)

    return give_call(target, call)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_layers_stand_around_each_other_and_come_off_in_any_order(order: tuple[int, ...]) -> None:
    target, other, log = Doubler(), Doubler(), []
    undo = [layer(target, str(index), log) for index in range(3)]
    left = ["2", "1", "0"]
    assert (target(3), log) == (6, left)
    for index in order:
        undo[index]()
        left.remove(str(index))
        log.clear()
        assert (target(3), log) == (6, left)
    assert type(target) is Doubler
    assert (other(3), log) == (6, [])


def test_a_layer_that_is_put_on_after_one_was_taken_off_below_it() -> None:
    target, log = Doubler(), []
    first, second = layer(target, "a", log), layer(target, "b", log)
    first()
    third = layer(target, "c", log)
    assert (target(1), log) == (2, ["c", "b"])
    second()
    third()
    assert type(target) is Doubler


def test_copies_and_others_of_the_class_are_called_as_the_original() -> None:
    target, log = Doubler(), []
    layer(target, "a", log)
    layer(target, "b", log)
    twins = [copy.copy(target), copy.deepcopy(target), pickle.loads(pickle.dumps(target))]
    assert all(type(twin) is Doubler for twin in twins)
    sibling = type(target)()  # has the class that was made, and is not its owner
    assert (sibling(4), log) == (8, [])
    layer(sibling, "c", log)
    assert (sibling(4), log) == (8, ["c"])


def test_a_module_keeps_its_hooks_below_its_layers() -> None:
    module = nn.Linear(2, 2)
    seen: list[str] = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    below = call_below(module)

    def call(value: torch.Tensor) -> Any:
        seen.append("call")
        return below(value)

    undo = give_call(module, call)
    module(torch.ones(1, 2))
    undo()
    module(torch.ones(1, 2))
    assert seen == ["call", "hook", "hook"]


class Scheduler:
    def step(self, prediction: Any) -> Any:
        return prediction


def test_schedulers_are_watched_in_layers_too() -> None:
    scheduler = Scheduler()
    first, second = watch_scheduler(scheduler), watch_scheduler(scheduler)
    first()
    assert scheduler.step(5) == 5
    second()
    assert type(scheduler) is Scheduler
