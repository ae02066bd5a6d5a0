"""Methods that `PipelineParallelMixin` wraps when a pipeline is defined with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK = "_omni_pp_wrapped"
_OFFERS = ("predict_noise_maybe_with_cfg", "combine_cfg_noise", "scheduler_step_maybe_with_cfg")
"""What makes a class the guidance mixin; packages of strategies do not import each other."""

Around = Callable[[Any, Callable[[], Any]], Any]
"""Given the pipeline and the call of its own method; returns what the wrapped one does."""


def check_class_order(cls: type, mixin: type) -> None:
    """Check that guidance comes behind stages in the order of base classes.

    Raises:
        TypeError: A guidance mixin is missing, or comes first.
    """
    order = cls.__mro__
    place = order.index(mixin)
    guidance = [
        (index, base)
        for index, base in enumerate(order)
        if not issubclass(base, mixin)
        and (base.__name__ == "CFGParallelMixin" or all(name in vars(base) for name in _OFFERS))
    ]
    if not guidance:
        msg = (
            f"{cls.__name__} has no CFGParallelMixin among its bases, whose predictions "
            f"{mixin.__name__} runs in stages; "
            f"write: class {cls.__name__}({mixin.__name__}, CFGParallelMixin)"
        )
        raise TypeError(msg)
    index, base = guidance[0]
    if index < place:
        msg = (
            f"{base.__name__} comes before {mixin.__name__} in the bases of {cls.__name__}, so "
            "its methods would hide those that know of stages; "
            f"write: class {cls.__name__}({mixin.__name__}, {base.__name__})"
        )
        raise TypeError(msg)


def wrap_method(cls: type, name: str, around: Around) -> None:
    """Put a call around a method of a class, its own or inherited; never twice.

    An inherited one is looked up at each call, behind the class in the order of the object's
    bases, so that classes that are put together later keep their order.
    """
    found = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(found) or hasattr(found, _MARK):
        return
    is_own = name in vars(cls)

    @functools.wraps(found)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = functools.partial(found, self) if is_own else getattr(super(cls, self), name)
        return around(self, functools.partial(method, *args, **kwargs))

    setattr(wrapped, _MARK, True)
    setattr(cls, name, wrapped)
