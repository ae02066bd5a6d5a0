"""Methods of one object that are replaced, and put back: no other of its class is touched."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any
from weakref import ref

from omni_parallel_state.denoising.waiting import resolve, resolve_all

Undo = Callable[[], None]


class Replaced:
    """Marks the classes that are made here, each for one object."""

    _omni_original: type
    """The class that the object had before the first of them."""
    _omni_owner: Callable[[], Any]
    """The object, while it is alive."""
    _omni_active: bool
    """Whether it has not been taken off."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and saved objects are of the original class, which can be imported."""
        made, original = type(self), self._omni_original
        how: Any = super().__reduce_ex__(protocol)
        make = _blank if how[0] is copyreg.__newobj__ else how[0]  # type: ignore[attr-defined]
        return (make, tuple(original if arg is made else arg for arg in how[1]), *how[2:])


def _blank(cls: Any, *args: Any) -> Any:
    """An object whose state comes after; pickle's own way to it checks the class."""
    return cls.__new__(cls, *args)


def give_call(target: Any, call: Callable[..., Any]) -> Undo:
    """Make one object be called otherwise, and no other of its class.

    Python looks ``__call__`` up on the class, so the object gets a subclass, of the same name.
    A copy of it is called as the original class says. An object may be given several calls, of
    which each stands around those before it; they may be taken off in any order.

    Args:
        target: The object.
        call: Called in its place, with its arguments; `call_below` is what it stands around.

    Returns:
        Takes it off.
    """
    return _replace(target, "__call__", lambda _, args, kwargs: call(*args, **kwargs))


def call_below(target: Any) -> Callable[..., Any]:
    """How an object is called now: for what will be given to it, the call to stand around."""
    cls, weak = _class_of(target), ref(target)

    def below(*args: Any, **kwargs: Any) -> Any:
        return cls.__call__(weak(), *args, **kwargs)

    return below


def is_given_call(target: Any) -> bool:
    """Whether an object is called otherwise than its class says."""
    return issubclass(type(target), Replaced) and type(target)._omni_owner() is target


def watch_scheduler(scheduler: Any) -> Undo:
    """Have a scheduler be given real predictions: it keeps them, and asks for their class."""
    cls = _class_of(scheduler)

    def step(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cls.step(self, *resolve_all(args), **resolve_all(kwargs))

    return _replace(scheduler, "step", step)


def _class_of(target: Any) -> Any:
    """The class to derive from; one made of the class of a replaced object has that class."""
    cls = type(target)
    if issubclass(cls, Replaced) and cls._omni_owner() is not target:
        return cls._omni_original
    return cls


def _replace(
    target: Any, name: str, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
) -> Undo:
    """Make an object an instance of a subclass with a method of its own."""
    cls, own = _class_of(target), ref(target)
    method = getattr(cls, name)

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = self is own() and subclass._omni_active
        return call(self, args, kwargs) if mine else method(self, *args, **kwargs)

    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        name: called,
        "_omni_original": getattr(cls, "_omni_original", cls),
        "_omni_owner": staticmethod(own),
        "_omni_active": True,
    }
    bases = (cls,) if issubclass(cls, Replaced) else (Replaced, cls)
    subclass: Any = type(cls.__name__, bases, members)
    target.__class__ = subclass

    def undo() -> None:
        subclass._omni_active = False
        alive = own()
        if alive is None:
            return
        left: Any = type(alive)
        while "_omni_active" in left.__dict__ and not left._omni_active:
            left = left.__bases__[-1]
        if left is not type(alive):
            alive.__class__ = left

    return undo


def real(output: Any) -> Any:
    """The output of a pipeline without anything that stands for a prediction."""
    if type(output) in (tuple, list, dict):
        return resolve_all(output)
    for name, value in list(getattr(output, "__dict__", {}).items()):
        found = resolve_all(value)
        if found is not value:
            setattr(output, name, found)
    return resolve(output)
