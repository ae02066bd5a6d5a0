import pytest
import torch
from group_cases import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omni_group_coordinator import TensorSpec
from omni_group_coordinator.messages import pack, specs_in, unpack
from omni_group_coordinator.wire import decode, encode

tensors = st.builds(
    lambda seed, shape, dtype: seeded(seed, *shape, dtype=dtype),
    st.integers(0, 99),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
keys = st.text(max_size=5) | st.sampled_from(["$tensor", "$keys", "$dict"]) | st.integers()
nested = st.recursive(
    tensors | st.none() | st.integers() | st.text(max_size=5) | st.just(torch.Size([2, 3])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def alike(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@given(nested)
def test_tensors_are_taken_out_of_nested_data_and_put_back(value: object):
    packed, taken = pack(value)
    header = decode(encode(packed))
    specs = specs_in(header)
    assert specs == {index: TensorSpec.of(tensor) for index, tensor in enumerate(taken)}
    assert alike(unpack(header, dict(enumerate(taken))), value)


def test_a_spec_says_shape_dtype_and_device_type():
    spec = TensorSpec.of(seeded(1, 2, 0, dtype=torch.float16))
    assert spec == TensorSpec(torch.Size([2, 0]), torch.float16, "cpu")
    assert str(spec) == "(2, 0) float16 cpu"


@pytest.mark.parametrize(("device_type", "lands"), [("cpu", "cpu"), ("cuda", "meta")])
def test_tensors_of_an_accelerator_land_on_the_receivers_own_device(device_type: str, lands: str):
    spec = TensorSpec(torch.Size([2]), torch.int8, device_type)
    buffer = spec.empty(torch.device("meta"))
    assert (buffer.device.type, buffer.shape, buffer.dtype) == (lands, spec.shape, spec.dtype)
