"""`AsyncLatents` does as the latents would, and waits once, for every handle."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_staged_pipelines import seeded

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.waiting import arrived, is_deferred, resolve
from omni_pp.async_latents import resolved
from omni_pp.pipeline_parallel import AsyncLatents

X = seeded(2, 6, 8, seed=1)
Pair = namedtuple("Pair", "one other")


class Handle:
    """Fills its buffer when it is waited for."""

    def __init__(self, buffer: Tensor | None = None, value: Any = None, error: Any = None) -> None:
        self.buffer, self.value, self.error = buffer, value, error
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1
        if self.error is not None:
            raise self.error
        if self.buffer is not None:
            self.buffer.copy_(self.value)


def later(value: Tensor) -> tuple[AsyncLatents, Handle]:
    """Latents under way, in a buffer of nonsense."""
    buffer = torch.full_like(value, 77)
    handle = Handle(buffer, value)
    return AsyncLatents({"latents": buffer}, [handle], []), handle


def same(found: Any, expected: Any) -> None:
    found = resolve(found)
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


BINARY = ["add", "sub", "mul", "truediv", "pow", "floordiv", "mod", "matmul"]
BINARY += ["eq", "ne", "lt", "le", "gt", "ge"]
WHOLE = ["and_", "or_", "xor", "lshift", "rshift"]
IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod"]
WHOLE_IN_PLACE = ["iand", "ior", "ixor", "ilshift", "irshift"]
PLACES = [0, -1, (slice(None), 1), (..., None), slice(0, 1), torch.tensor([1, 0]), X > 0]

USES: dict[str, Callable[[Any], Any]] = {
    **{f"index {i}": lambda x, at=at: x[at] for i, at in enumerate(PLACES)},
    "negative": lambda x: -x,
    "positive": lambda x: +x,
    "abs": abs,
    "length": len,
    "items": list,
    "reversed": lambda x: list(reversed(x)),
    "contains": lambda x: 77.0 in x,
    "bool": lambda x: bool(x[0, 0, 0]),
    "number": lambda x: (float(x[0, 0, 0]), int(x[0, 0, 0]), complex(x[0, 0, 0])),
    "as an index": lambda x: [7, 8, 9][x[0, 0, 0].long() * 0],
    "text": lambda x: (str(x), repr(x), f"{x[0, 0, 0]:.3f}"),
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "numpy": np.asarray,
    "dlpack": torch.from_dlpack,
    "attributes": lambda x: (x.shape, x.dtype, x.device, x.ndim, x.mT.shape, x.requires_grad),
    "questions": lambda x: (x.size(), x.size(1), x.dim(), x.numel(), x.is_contiguous(), x.stride()),
    "casts": lambda x: x.half().float().to(torch.float64),
    "methods": lambda x: x.view(2, -1).mul(2).clamp(-1, 1).sum(1, keepdim=True),
    "named results": lambda x: x.max(dim=1).values,
    "functions": lambda x: torch.cat([X, x], 1).mean(),
    "functional": lambda x: torch.nn.functional.layer_norm(x, (8,)),
    "linear": lambda x: torch.nn.functional.linear(x, torch.eye(8)),
    "first of a list": lambda x: torch.stack([x, X]),
    "where": lambda x: torch.where(x > 0, x, X),
    "setting": lambda x: (operator.setitem(x, 0, 5.0), x * 1)[1],
    "in place": lambda x: (x.add_(1), x * 1)[1],
    "out": lambda x: (torch.add(X, 1, out=x), x * 1)[1],
    "copying into": lambda x: X.clone().copy_(x),
    "like": torch.zeros_like,
    "new": lambda x: x.new_ones(2),
    "named tuple": lambda x: torch.stack(Pair(x, X)),
    "tuple in a named tuple": lambda x: torch.block_diag(*Pair(x[0], X[0])),
    "no operand of its own": lambda x: torch.equal(x, X),
}
for _name in BINARY:
    _call = getattr(operator, _name)
    _other = {"matmul": X.mT, "pow": X.abs()}.get(_name, X)
    USES[_name] = lambda x, call=_call, other=_other: call(x, other)
    USES[f"r{_name}"] = lambda x, call=_call, other=_other: call(other, x)
    if _name != "matmul":
        USES[f"{_name} 3"] = lambda x, call=_call: call(x, 3)
        USES[f"3 {_name}"] = lambda x, call=_call: call(3, x)
for _name in IN_PLACE:
    _call = getattr(operator, _name)
    USES[_name] = lambda x, call=_call: call(x.abs_(), X.abs())
WHOLES: dict[str, Callable[[Any], Any]] = {"invert": lambda x: ~x}
for _name in WHOLE:
    _call = getattr(operator, _name)
    WHOLES[_name] = lambda x, call=_call: call(x, 3)
    WHOLES[f"3 {_name}"] = lambda x, call=_call: call(3, x)
for _name in WHOLE_IN_PLACE:
    _call = getattr(operator, _name)
    WHOLES[_name] = lambda x, call=_call: call(x, 3)


@pytest.mark.parametrize("name", [*USES, *WHOLES])
def test_it_does_as_the_latents_would(name: str) -> None:
    use = USES.get(name) or WHOLES[name]
    value = seeded(2, 6, 8) if name in USES else torch.arange(6).view(2, 3)
    expected = use(value.clone())
    latents, handle = later(value)
    same(use(latents), expected)
    latents.wait()
    assert handle.waits == 1
    again, handle = later(value)
    again.resolve()
    same(use(again), expected)
    assert handle.waits == 1


def test_no_dunder_of_tensors_is_left_out() -> None:
    """But for those of its making, those that attributes answer, and those of Python 2."""
    own = {"__init__", "__new__", "__getattribute__", "__init_subclass__", "__subclasshook__"}
    own |= {"__annotations__", "__weakref__", "__sizeof__", "__torch_dispatch__", "__setstate__"}
    own |= {"__slotnames__"}  # of copyreg
    old = {"__div__", "__idiv__", "__rdiv__", "__long__", "__nonzero__"}
    by_attribute = {"__array_wrap__", "__cuda_array_interface__", "__dlpack_c_exchange_api__"}
    by_attribute |= {"__getstate__", "__reduce__"}
    has = {name for cls in AsyncLatents.__mro__[:-1] for name in vars(cls)}
    missing = {name for name in dir(Tensor) if name.startswith("__")} - has
    assert missing <= own | old | by_attribute


def test_changes_in_place_are_changes_of_the_latents() -> None:
    latents, _ = later(torch.arange(6))
    same_one = latents
    latents <<= 1
    latents |= 1
    same(same_one.resolve(), torch.arange(6) * 2 + 1)


def test_shape_dtype_and_device_are_known_before() -> None:
    latents, handle = later(X.half())
    part = latents[:, 1:3].float() * 2
    assert latents.shape == (2, 6, 8)
    assert (latents.dtype, latents.ndim, len(latents)) == (torch.float16, 3, 2)
    assert (latents.size(1), latents.numel(), latents.dim()) == (6, 96, 3)
    assert latents.device == torch.device("cpu")
    assert part.shape == (2, 2, 8)
    assert part.dtype == torch.float32
    assert not isinstance(latents, Tensor)
    assert isinstance(latents, AsyncLatents)
    assert handle.waits == 0
    assert not arrived(latents)
    same(part, X.half()[:, 1:3].float() * 2)
    assert handle.waits == 1
    assert not isinstance(latents, Tensor)


def test_the_device_may_be_told() -> None:
    for device, found in ((None, "meta"), (torch.device("cpu"), "cpu")):
        handle = Handle()
        latents = AsyncLatents({"latents": X.to("meta")}, [handle], [], device=device)
        assert latents.device == torch.device(found)
        assert (latents * 2).device == torch.device(found)
        assert handle.waits == 0


def test_postproc_comes_after_all_handles() -> None:
    order: list[str] = []
    tensors: dict[str, Any] = {}

    class Noting(Handle):
        def wait(self) -> None:
            order.append("wait")

    calls = [lambda: order.append("one"), lambda: tensors.update(latents=X)]
    latents = AsyncLatents(tensors, [Noting(), Noting()], calls)
    assert latents.wait() is X
    assert latents.resolve() is X
    assert order == ["wait", "wait", "one"]


def test_every_handle_is_waited_for_also_when_one_raises() -> None:
    handles = [Handle(), Handle(error=KeyError("lost")), Handle(error=ValueError()), Handle()]
    called: list[int] = []
    latents = AsyncLatents({"latents": X}, handles, [lambda: called.append(1)])
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            latents.sum()
    assert [handle.waits for handle in handles] == [1] * 4
    assert not called


def test_every_handle_is_waited_for_once_when_an_operation_raises() -> None:
    latents, handle = later(X)
    wrong, on_wrong, right = latents.view(5, 5), latents.view(5, 5) + 1, latents + 1
    assert is_deferred(wrong)
    with pytest.raises(RuntimeError, match="invalid for input"):
        latents.resolve()
    same(latents.resolve(), X)
    same(right, X + 1)
    for one in (wrong, on_wrong):
        with pytest.raises(RuntimeError, match="invalid for input"):
            resolve(one)
    assert handle.waits == 1


def test_latents_that_no_handle_brings_are_an_error() -> None:
    with pytest.raises(ParallelError, match=r"no 'latents' among the received tensors: \['x'\]"):
        AsyncLatents({"x": X}, [], []).resolve()


def test_latents_may_be_several() -> None:
    latents = AsyncLatents({"latents": (X, X[:, :2].half())}, [], [])
    one, other = latents
    assert other.shape == (2, 2, 8)
    same((resolve(one), resolve(other * 2)), (X, X[:, :2].half() * 2))


@dataclass
class Output:
    images: Any
    more: Any = None


@dataclass(frozen=True)
class Fixed:
    images: Any


def test_outputs_of_pipelines_hold_real_latents() -> None:
    latents = later(X)[0]
    plain = Output(X)
    assert resolved(plain) is plain
    given = Pair(Output([later(X)[0]]), {"a": (Fixed(latents), latents * 2, 3)})
    found = resolved(given)
    assert type(found) is Pair
    same(found.one.images, [X])
    same(found.other["a"][0].images, X)
    same(found.other["a"][1:], (X * 2, 3))
    assert all(type(item) is Tensor for item in (found.one.images[0], found.other["a"][1]))
