"""How a public name is announced to go."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

_P = ParamSpec("_P")
_T = TypeVar("_T")


def deprecated(
    *, since: str, removed_in: str, instead: str
) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Mark a function or method as going: its callers are warned, and its docstring says so.

    Python shows a `FutureWarning` once for each place that calls, and to users too, whose programs
    will stop. For a class, mark its ``__init__``. ``hatch run versions`` fails when something is
    still there in the version in which it was to be gone.

    Args:
        since: The version that announced it, such as ``"0.2"``.
        removed_in: The first version without it, such as ``"0.4"``.
        instead: What to write in its place, as code.
    """

    def mark(function: Callable[_P, _T]) -> Callable[_P, _T]:
        name = f"{function.__module__}.{function.__qualname__}"
        text = f"{name} is deprecated since {since} and goes in {removed_in}; use {instead}"

        @wraps(function)
        def warned(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            warnings.warn(text, FutureWarning, stacklevel=2)
            return function(*args, **kwargs)

        note = f"Deprecated since {since}, goes in {removed_in}: use ``{instead}``."
        warned.__doc__ = f"{function.__doc__.rstrip()}\n\n{note}" if function.__doc__ else note
        cast("Any", warned).__deprecated__ = text  # where PEP 702 has it
        return warned

    return mark
