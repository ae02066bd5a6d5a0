import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omni_group_coordinator import CommunicationError, ParallelConfigError
from omni_group_coordinator.messages import pack
from omni_group_coordinator.wire import (
    FRAME_BYTES,
    FRAME_ROOM,
    decode,
    encode,
    frame,
    unframe,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]
TAGS = ["$tuple", "$size", "$dtype", "$device", "$dict", "$keys", "$tensor", "$"]

any_text = st.text(alphabet=st.characters(), max_size=8)  # with lone surrogates
hashable = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False)
    | any_text
    | st.sampled_from(TAGS)
    | st.tuples(st.integers(), any_text)
    | st.lists(st.integers(0, 2**40), max_size=4).map(torch.Size)
    | st.sampled_from(DTYPES)
)
scalars = hashable | st.floats() | st.sampled_from([torch.device("cpu"), torch.device("cuda:3")])
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(any_text | st.sampled_from(TAGS), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
    ),
    max_leaves=20,
)


def shape_of(value: Any) -> Any:
    """The value with the types of all parts, NaN and the sign of zero made comparable."""
    if isinstance(value, dict):
        return dict, [(shape_of(key), shape_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [shape_of(item) for item in value]
    if isinstance(value, float):
        return float, struct.pack("d", value) if not math.isnan(value) else "nan"
    return type(value), value


@given(plain)
def test_plain_data_comes_back_as_it_was(value: object):
    assert shape_of(decode(encode(value))) == shape_of(value)


@pytest.mark.parametrize(
    "value",
    [
        {"$tuple": [1]},
        {"$dict": [[1, 2]], "$size": []},
        {1: "int", "1": "text", True and 2: None},
        {("a", 1): [(), [], {}]},
        "naïve 漢字 \U0001f600 \x00 \ud800",
        [math.inf, -math.inf, -0.0, 5e-324, 10**300],
        torch.Size([2, 0, 3]),
        (torch.float8_e5m2, torch.device("cuda", 1)),
    ],
)
def test_values_that_look_like_tags_or_numbers_come_back_as_they_were(value: object):
    assert shape_of(decode(encode(value))) == shape_of(value)


class Color(IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        1j,
        Color.RED,
        Point(1),
        OrderedDict(a=1),
        torch.ones(2),
        print,
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_a_type_error(value: object):
    with pytest.raises(TypeError, match="does not travel between ranks"):
        encode(value)


def test_the_type_error_names_the_place():
    with pytest.raises(TypeError, match=r"value\['a'\]\[1\] is of type builtins\.set"):
        encode({"a": [1, {2}]})
    with pytest.raises(TypeError, match=r"key b'k' of value\[0\] is of type builtins\.bytes"):
        encode([{b"k": 1}])


def test_a_dtype_that_this_torch_lacks_is_an_error_that_names_it():
    with pytest.raises(ParallelConfigError, match="'float3'"):
        decode(b'{"$dtype":"float3"}')
    with pytest.raises(ParallelConfigError, match="'nn'"):
        decode(b'{"$dtype":"nn"}')


@given(st.integers(0, 3 * FRAME_BYTES))
def test_a_frame_and_its_rest_hold_every_byte(length: int):
    data = bytes(i % 251 + 1 for i in range(length))
    first, second = frame(data)
    assert first.shape == (FRAME_BYTES,)
    head, rest = unframe(first, group="g")
    assert rest == (0 if second is None else second.numel())
    assert head + (b"" if second is None else bytes(second.tolist())) == data


@pytest.mark.parametrize(("length", "rest"), [(FRAME_ROOM, 0), (FRAME_ROOM + 1, 1)])
def test_a_second_message_follows_only_where_the_frame_is_full(length: int, rest: int):
    first, second = frame(b"x" * length)
    assert (0 if second is None else second.numel()) == rest
    assert unframe(first, group="g")[1] == rest


def test_a_message_that_is_no_header_is_an_error_naming_the_group():
    stray = torch.arange(1, FRAME_BYTES + 1).to(torch.uint8)
    with pytest.raises(CommunicationError, match=r"'pp'.*in another order") as caught:
        unframe(stray, group="pp")
    assert caught.value.group == "pp"


def endless() -> dict[str, object]:
    value: dict[str, object] = {}
    value["again"] = [value]
    return value


@pytest.mark.parametrize("take", [encode, pack])
def test_a_value_that_contains_itself_is_a_type_error(take: Callable[[object], object]):
    with pytest.raises(TypeError, match="contains itself"):
        take(endless())


def test_a_refused_entry_of_a_tensor_dict_is_named_as_the_user_wrote_it():
    packed, _ = pack({"o": {"p": [object()]}})
    with pytest.raises(TypeError, match=r"^value\['o'\]\['p'\]\[0\] is of type"):
        encode(packed)
