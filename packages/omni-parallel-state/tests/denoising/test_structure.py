"""Outputs of denoisers in parts, and together again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_results import seeded

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.structure import describe, rebuild, tensor_specs, tensors_in


class Outer:
    @dataclass
    class Inner:
        sample: Any
        loss: float | None = None


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
tensors = st.builds(
    lambda shape, dtype: seeded(*shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
outputs = st.recursive(
    tensors | plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3).map(OrderedDict)
        | st.builds(Outer.Inner, inner)
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, Outer.Inner):
        return same(one.sample, other.sample) and one.loss == other.loss
    return bool(one == other)


@settings(deadline=None)
@given(outputs)
def test_an_output_is_rebuilt_of_its_description_and_tensors(output):
    description = describe(output)
    found = tensors_in(output)
    assert tensor_specs(description) == [(tuple(t.shape), t.dtype) for t in found]
    assert same(rebuild(description, iter(found)), output)


def test_a_tuple_of_one_is_not_its_element():
    tensor = seeded(2, 3)
    assert describe((tensor,)) != describe(tensor) != describe([tensor])
    assert type(rebuild(describe((tensor,)), iter([tensor]))) is tuple


@pytest.mark.parametrize("value", [{1, 2}, object(), Outer, iter([1])], ids=repr)
def test_what_does_not_travel_is_an_error_that_names_it(value):
    with pytest.raises(ParallelError, match=rf"returned a {type(value).__name__}, which does not"):
        describe((seeded(1), value))
