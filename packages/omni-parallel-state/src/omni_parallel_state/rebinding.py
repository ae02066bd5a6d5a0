"""Giving one object other functions to call, without touching the module that defines its class.

The code of a model says ``F.scaled_dot_product_attention(...)``: a name that Python looks up among
the globals of the function. A copy of the function with globals of its own, in which that name
means something else, is put into a subclass, and one object is made an instance of the subclass.
Nothing else in the process sees it, it costs nothing per call, and torch.compile traces it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import nn

Replace = Callable[[Any], Any]
"""What stands for a value; the value itself if it stays."""

_MARK = "_calls_are_replaced"
_DEPTH = 3  # torch.nn.functional is three names deep; helpers call helpers about as deep


def is_dispatch(value: object) -> bool:
    """Whether this is diffusers' ``dispatch_attention_fn``, told without importing diffusers."""
    return (
        getattr(value, "__name__", "") == "dispatch_attention_fn"
        and getattr(value, "__module__", "") == "diffusers.models.attention_dispatch"
    )


def subclass_with(cls: type, replace: Replace) -> type | None:
    """A subclass whose methods use replaced functions; ``None`` if no method uses any.

    Each class of the inheritance gets its changed methods just before itself, so that overriding
    methods still override, and those that they reach by ``super()`` are the changed ones.

    Args:
        cls: The class.
        replace: Gives the replacement of a function that a method refers to.
    """
    shadows: list[type] = []
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        changed = _changed_methods(base, replace)
        if changed:
            # The class keeps its name: some code looks for it, and messages show it.
            extra = {"__module__": base.__module__, "__slots__": ()}
            shadows.append(type(base.__name__, (base,), changed | extra))
    if not shadows:
        return None
    bases = (*shadows,) if issubclass(shadows[0], cls) else (cls, *shadows)
    own = {"__module__": cls.__module__, "__slots__": (), _MARK: True}
    return type(cls.__name__, bases, own)


def is_rebound(owner: object) -> bool:
    """Whether an object is of a class that `subclass_with` made: somebody took its calls over."""
    return _MARK in vars(type(owner))


def _changed_methods(cls: type, replace: Replace) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, staticmethod) else member
        if isinstance(function, FunctionType):
            copy = rebound(function, replace)
            if copy is not function:
                changed[name] = staticmethod(copy) if isinstance(member, staticmethod) else copy
    return changed


def rebound(function: FunctionType, replace: Replace, depth: int = _DEPTH) -> FunctionType:
    """A copy of a function that uses replaced functions; the function itself if it uses none."""
    names = _names(function.__code__)
    table = {}
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        new = _replaced(value, names, function.__module__, replace, depth)
        if new is not value:
            table[name] = new
    if not table:
        return function
    scope = function.__globals__ | table
    # With this name torch.compile would look the globals up in the module of that name.
    scope.pop("__name__", None)
    copy = FunctionType(
        _own_code(function.__code__),
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__doc__, copy.__annotations__ = function.__doc__, function.__annotations__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return copy


def _own_code(code: CodeType) -> CodeType:
    """A copy, inner functions' too: torch.compile keeps what it compiled by code object."""
    consts = (
        _own_code(const) if isinstance(const, CodeType) else const for const in code.co_consts
    )
    return code.replace(co_consts=tuple(consts))


def _replaced(value: Any, names: set[str], module: str, replace: Replace, depth: int) -> Any:
    new = replace(value)
    if new is not value or depth == 0:
        return new
    if isinstance(value, ModuleType):
        members = {name: getattr(value, name) for name in names if hasattr(value, name)}
        changed = {
            name: _replaced(member, names, module, replace, depth - 1)
            for name, member in members.items()
            if isinstance(member, ModuleType) or callable(member)
        }
        if any(changed[name] is not members[name] for name in changed):
            return SimpleNamespace(**(members | changed))
    elif isinstance(value, FunctionType) and value.__module__ == module:
        return rebound(value, replace, depth - 1)  # a helper beside the class
    return value


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
