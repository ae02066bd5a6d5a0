"""What stands for a prediction that another rank computes, until somebody needs it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from omni_group_coordinator import ParallelError

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
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGIC = ("and", "or", "xor", "rand", "ror", "rxor", "invert")
_OTHERS = ("floordiv", "rfloordiv", "mod", "rmod", "matmul", "rmatmul", "setitem", "delitem", "pos")
_PROMPT_OPERATORS = (*_IN_PLACE, *_COMPARISONS, *_LOGIC, *_OTHERS)
_CONVERSIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
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


class Round(Protocol):
    """What knows when predictions arrive."""

    def flush(self) -> None:
        """Have every prediction that is under way arrive."""

    def remember(self, operation: Deferred) -> None:
        """Take note of an operation on predictions that are under way, to be made by `flush`."""


class Deferred:
    """Behaves as a prediction that has not arrived.

    Slices, casts and arithmetic that need one prediction alone wait for it; so they can be asked
    for before the next branch is known. Anything else has the predictions arrive first and is then
    done on the real ones. Either way the result is what it would be of a real one: where an
    operand has been changed in place meanwhile, that is an error.

    Args:
        round_: That of the prediction.
        source: Which prediction it is of, or is made of.
        operation: Makes the value once that has arrived; ``None`` for a prediction itself.
    """

    __slots__ = ("__weakref__", "_omni_operation", "_omni_round", "_omni_source", "_omni_value")

    def __init__(
        self, round_: Round, source: object, operation: Callable[[], Any] | None = None
    ) -> None:
        self._omni_round: Round | None = round_
        self._omni_source = source
        self._omni_operation = operation
        self._omni_value: Any = None
        if operation is not None:
            round_.remember(self)

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
        return getattr(resolve(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_omni_"):
            object.__setattr__(self, name, value)
        else:
            setattr(resolve(self), name, value)

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


def is_deferred(value: object) -> bool:
    """Whether a value is one of these, arrived or not."""
    return type(value) is Deferred


def arrived(value: Deferred) -> bool:
    """Whether the value is there."""
    return value._omni_round is None


def source_of(value: Deferred) -> object:
    """Which prediction it is of, or is made of."""
    return value._omni_source


def fill(value: Deferred, found: Any) -> None:
    """Have the value arrive."""
    value._omni_value = found
    value._omni_round = value._omni_operation = value._omni_source = None


def perform(value: Deferred) -> None:
    """Do the operation that was waiting, now that its operands are there."""
    if value._omni_operation is not None:
        fill(value, value._omni_operation())


def resolve(value: Any) -> Any:
    """The value, for which predictions arrive if they must; anything else as it is."""
    if not is_deferred(value):
        return value
    if value._omni_round is not None:
        value._omni_round.flush()
    if value._omni_round is not None:
        msg = (
            "a prediction of an earlier call was never computed: the call that it belongs to was "
            "broken off"
        )
        raise ParallelError(msg)
    return value._omni_value


def resolve_all(value: Any) -> Any:
    """As `resolve`, also for what is within tuples, lists and dicts."""
    if is_deferred(value):
        return resolve(value)
    if type(value) in (tuple, list):
        items = [resolve_all(item) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if type(value) is dict:
        found = {key: resolve_all(item) for key, item in value.items()}
        return found if any(found[key] is not value[key] for key in value) else value
    return value


# -- operations --------------------------------------------------------------------------------


def _apply(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], may_wait: bool
) -> Any:
    waiting = [item for item in _leaves((args, kwargs)) if is_deferred(item) and not arrived(item)]
    if not waiting or not may_wait or len({id(source_of(item)) for item in waiting}) > 1:
        return function(*resolve_all(args), **resolve_all(kwargs))
    operands = _Operands(args, kwargs)
    round_ = waiting[0]._omni_round
    return Deferred(round_, source_of(waiting[0]), lambda: operands.call(function))


class _Operands:
    """The arguments of an operation that waits; what it then finds in them is what was there."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = _kept(args), _kept(kwargs)
        self._versions = [
            (tensor, tensor._version)
            for tensor in _leaves((self._args, self._kwargs))
            if isinstance_tensor(tensor) and not tensor.is_inference()
        ]

    def call(self, function: Callable[..., Any]) -> Any:
        for tensor, version in self._versions:
            if tensor._version != version:
                msg = (
                    f"a tensor of shape {tuple(tensor.shape)} was combined with a prediction that "
                    "had not arrived, and then changed in place; change a copy of it"
                )
                raise ParallelError(msg)
        return function(*resolve_all(self._args), **resolve_all(self._kwargs))


def isinstance_tensor(value: object) -> bool:
    """Whether it is a real tensor; does not have a prediction arrive, as ``isinstance`` would."""
    return not is_deferred(value) and isinstance(value, Tensor)


def _kept(value: Any) -> Any:
    """Containers of their own, and copies of tensors of inference mode, which count no changes."""
    if is_deferred(value):
        if not arrived(value):
            return value
        value = resolve(value)
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    if type(value) is dict:
        return {key: _kept(item) for key, item in value.items()}
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if not is_deferred(value) and isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif not is_deferred(value) and isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _define(name: str, *, may_wait: bool) -> None:
    reflected = name.startswith("r")
    plain = name.removeprefix("r")
    function = getattr(operator, plain + "_" * (plain in ("and", "or")))

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
