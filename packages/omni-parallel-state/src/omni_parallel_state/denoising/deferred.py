"""What stands for a prediction that another rank computes, until somebody needs it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from omni_parallel_state.denoising.operands import Operands, isinstance_tensor, leaves
from omni_parallel_state.denoising.waiting import (
    Waiting,
    arrived,
    is_deferred,
    like_of,
    resolve,
    resolve_all,
    source_of,
)

# What pipelines do with one prediction before they ask for the next. All of these give a tensor
# that depends on nothing but their arguments, and change none of them.
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone")
_VIEWS = ("squeeze", "unsqueeze", "view", "reshape", "flatten", "unflatten", "permute", "expand")
_ARITHMETIC = ("add", "sub", "mul", "div", "true_divide", "neg", "abs", "pow", "repeat")
_DEFERRED_METHODS = frozenset((*_CASTS, *_VIEWS, *_ARITHMETIC, "detach", "transpose", "movedim"))
_DEFERRED_FUNCTIONS = _DEFERRED_METHODS | {"rsub", "rdiv", "rmul", "cat", "stack", "where", "lerp"}

_TWO_SIDED = ("add", "sub", "mul", "truediv", "pow")
_DEFERRED_OPERATORS = (*_TWO_SIDED, *(f"r{name}" for name in _TWO_SIDED), "neg", "abs", "getitem")
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "imatmul", "ifloordiv", "imod")
_IN_PLACE_LOGIC = ("iand", "ior", "ixor", "ilshift", "irshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGIC = ("and", "or", "xor", "rand", "ror", "rxor", "invert")
_SHIFTS = ("lshift", "rshift", "rlshift", "rrshift")
_OTHERS = ("floordiv", "rfloordiv", "mod", "rmod", "matmul", "rmatmul", "setitem", "delitem", "pos")
_PROMPT_OPERATORS = (*_IN_PLACE, *_IN_PLACE_LOGIC, *_COMPARISONS, *_LOGIC, *_SHIFTS, *_OTHERS)
_CONVERSIONS: dict[str, Callable[..., Any]] = {
    "reversed": reversed,
    "bool": bool,
    "float": float,
    "int": int,
    "complex": complex,
    "index": operator.index,
    "contains": operator.contains,
    "repr": repr,
    "str": str,
    "format": format,
    "dir": dir,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "reduce_ex": lambda value, protocol: value.__reduce_ex__(protocol),
    "array": lambda value, *args: value.__array__(*args),
    "dlpack": lambda value, **options: value.__dlpack__(**options),
    "dlpack_device": lambda value: value.__dlpack_device__(),
}


# Of a tensor that has no content.
_ATTRIBUTES = ("shape", "dtype", "ndim")
_QUESTIONS = ("size", "dim", "numel", "is_floating_point", "is_complex")


class Deferred(Waiting):
    """Behaves as a prediction that has not arrived.

    Slices, casts and arithmetic that need one prediction alone wait for it; so they can be asked
    for before the next branch is known. Anything else has the predictions arrive first and is then
    done on the real ones. Either way the result is what it would be of a real one: where an
    operand has been changed in place meanwhile, that is an error.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each function of its API that is given one."""
        name = getattr(func, "__name__", "")
        name = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
        deferred = name in _DEFERRED_FUNCTIONS and "out" not in (kwargs or {})
        return _apply(func, args, dict(kwargs or {}), deferred)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_omni_"):  # of one that torch.compile makes, before it is set
            raise AttributeError(name)
        if name in _DEFERRED_METHODS and not arrived(self):
            return lambda *args, **kwargs: _apply(_Method(name), (self, *args), kwargs, True)
        if name == "sample" and not arrived(self):  # the prediction, in outputs of diffusers
            return _apply(operator.attrgetter(name), (self,), {}, True)
        if name in (*_ATTRIBUTES, *_QUESTIONS, "device") and isinstance_tensor(
            like := like_of(self)
        ):
            round_ = self._omni_round
            return round_.device if name == "device" and round_ else getattr(like, name)
        return getattr(resolve(self), name)

    def __iter__(self) -> Iterator[Any]:
        like = like_of(self)
        return iter(
            [operator.getitem(self, i) for i in range(len(like))]
            if type(like) is tuple
            else resolve(self)
        )

    def __len__(self) -> int:
        like = like_of(self)
        return len(resolve(self) if like is None else like)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_omni_"):
            object.__setattr__(self, name, value)
        else:
            setattr(resolve(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(resolve(self), name)

    @property  # type: ignore[misc]  # which torch and isinstance only read
    def __class__(self) -> Any:
        """That of the prediction, for ``isinstance``; but for a tensor's.

        torch's C++ asks so whether it may read an object's memory as that of a tensor.
        """
        cls = type(resolve(self))
        return Deferred if issubclass(cls, Tensor) else cls

    def __hash__(self) -> int:
        return hash(resolve(self))


class _Method:
    """Calls a method of its first argument."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, self._name)(*args, **kwargs)


# -- operations --------------------------------------------------------------------------------


def _apply(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], may_wait: bool
) -> Any:
    waiting = [item for item in leaves((args, kwargs)) if is_deferred(item) and not arrived(item)]
    if not waiting or not may_wait or len({id(source_of(item)) for item in waiting}) > 1:
        return function(*resolve_all(args), **resolve_all(kwargs))
    operands = Operands(args, kwargs)
    round_ = waiting[0]._omni_round
    call, like = partial(operands.call, function), partial(operands.like, function)
    return Deferred(round_, source_of(waiting[0]), call, like)


def _define(name: str, *, may_wait: bool) -> None:
    # The module has "__rshift__" and no "__radd__": reflected operators are what it lacks.
    reflected = not hasattr(operator, f"__{name}__")
    function = getattr(operator, f"__{name.removeprefix('r') if reflected else name}__")

    def method(self: Deferred, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        return _apply(function, args, {}, may_wait)

    setattr(Deferred, f"__{name}__", method)


def _define_conversion(name: str, function: Callable[..., Any]) -> None:
    def method(self: Deferred, *args: Any, **options: Any) -> Any:
        return function(resolve(self), *args, **options)

    setattr(Deferred, f"__{name}__", method)


for _name in _DEFERRED_OPERATORS:
    _define(_name, may_wait=True)
for _name in _PROMPT_OPERATORS:
    _define(_name, may_wait=False)
for _name, _function in _CONVERSIONS.items():
    _define_conversion(_name, _function)
