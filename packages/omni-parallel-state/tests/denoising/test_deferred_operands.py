"""What a prediction was combined with counts as it was at that moment."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toy_results import seeded
from toy_round import Round

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.waiting import resolve

VALUE = seeded(2, 3)

COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "after": lambda p, x: p + x,
    "before": lambda p, x: x * p,
    "function": lambda p, x: torch.cat([x, p]),
    "named": lambda p, x: p.add(other=x),
    "index": lambda p, x: p[x > 0] if x.dtype != torch.bool else p[x],
    "view": lambda p, x: p + x[:1],
}


@pytest.mark.parametrize("name", COMBINED)
def test_an_operand_that_is_changed_in_place_meanwhile_is_an_error(name):
    x = VALUE.abs() > 0.5 if name == "index" else seeded(2, 3, seed=1)
    later = Round(VALUE.clone())
    found = COMBINED[name](later.predictions[0], x)
    x.copy_(~x if name == "index" else x + 1)
    with pytest.raises(ParallelError, match="and then changed in place; change a copy of it"):
        resolve(found)


@pytest.mark.parametrize("name", COMBINED)
def test_in_inference_mode_it_counts_as_it_was(name):
    with torch.inference_mode():
        x = VALUE.abs() > 0.5 if name == "index" else seeded(2, 3, seed=1)
        expected = COMBINED[name](VALUE, x)
        later = Round(VALUE.clone())
        found = COMBINED[name](later.predictions[0], x)
        x.copy_(~x if name == "index" else x + 1)
        assert later.flushes == 0
        assert torch.equal(resolve(found), expected)


def test_a_prediction_that_has_arrived_is_an_operand_like_any_other():
    earlier = Round(VALUE.clone())
    earlier.flush()
    later = Round(VALUE.clone())
    found = later.predictions[0] + earlier.predictions[0]
    resolve(earlier.predictions[0]).add_(1)
    with pytest.raises(ParallelError, match="and then changed in place"):
        resolve(found)


def test_a_list_of_operands_counts_as_it_was():
    later = Round(VALUE.clone())
    parts = [later.predictions[0], VALUE + 1]
    found = torch.cat(parts)
    parts[1] = VALUE + 2
    parts.append(VALUE)
    assert torch.equal(resolve(found), torch.cat([VALUE, VALUE + 1]))


def test_a_change_of_the_prediction_comes_after_what_was_asked_before():
    later = Round(VALUE.clone())
    prediction = later.predictions[0]
    double = prediction * 2
    prediction += 1
    assert torch.equal(resolve(double), VALUE * 2)
    assert torch.equal(resolve(prediction), VALUE + 1)


def test_a_change_afterwards_is_none_of_its_business():
    x = seeded(2, 3, seed=1)
    later = Round(VALUE.clone())
    found = later.predictions[0] + x
    later.flush()
    expected = VALUE + x
    x.zero_()
    assert torch.equal(resolve(found), expected)


def test_operands_are_let_go_when_it_has_arrived():
    x = seeded(2, 3, seed=1)
    gone = weakref.ref(x)
    later = Round(VALUE.clone())
    found = later.predictions[0] + x
    later.flush()
    del x
    gc.collect()
    assert gone() is None
    assert resolve(found).shape == (2, 3)


ABOUT: dict[str, Any] = {
    "shape": lambda p: p[:, 1:3].shape,
    "dtype": lambda p: (p.half() * 2).dtype,
    "ndim": lambda p: p[..., None].ndim,
    "device": lambda p: (p + 1).device,
    "size": lambda p: p.size(1),
    "numel": lambda p: (p[0] - 2).numel(),
    "length": lambda p: len(p[0]),
    "kind": lambda p: p.is_floating_point(),
    "with a tensor": lambda p: (p + seeded(2, 6, 8)).shape,
}


@pytest.mark.parametrize("name", ABOUT)
def test_of_what_was_seen_before_shape_and_dtype_are_known(name):
    value = seeded(2, 6, 8)
    for known, flushes in ((True, 0), (False, 1)):
        round_ = Round(value, known=known)
        assert ABOUT[name](round_.predictions[0]) == ABOUT[name](value)
        assert round_.flushes == flushes


def test_outputs_that_were_seen_before_are_unpacked_without_their_content():
    round_ = Round((seeded(2, 3), seeded(4)), known=True)
    video, sound = round_.predictions[0]
    assert (round_.flushes, video.shape, sound.shape) == (0, (2, 3), (4,))
    assert torch.equal(resolve(sound), seeded(4))
    assert round_.flushes == 1
