"""What travels between the pool and a rank: calls, answers and how they are pickled.

Calls and answers are pickled to bytes by cloudpickle, not by the pickler of multiprocessing:
tensors then travel as copies and outlive the process that made them.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import cloudpickle  # type: ignore[import-untyped]

from rank_harness.outcome import RemoteError

READY: Literal["ready"] = "ready"
"""From a rank: it is clean and waits for a task."""

RELEASE: Literal["release"] = "release"
"""To a rank that returned: nobody needs its process groups any more."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call of a function on one rank."""

    call: bytes
    """From `pack_call`."""
    environment: dict[str, str]
    """Variables to add for this run."""
    rank: int
    world_size: int
    store: str | None
    """File in which the ranks of this run meet; None: make no default group."""
    group_timeout: float
    """Seconds until a collective of the default group gives up."""
    sys_path: list[str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the function did on one rank."""

    status: Literal["ok", "raised"]
    body: bytes
    """Pickled return value or exception."""
    ended_at: float
    """Seconds of `time.monotonic()`."""
    traceback: str = ""


@dataclass(frozen=True)
class WarningFilter:
    """One entry of `warnings.filters`, with patterns as text."""

    action: str
    message: str
    category: type[Warning]
    module: str
    line: int

    def install(self) -> None:
        """Put this filter in front of all others."""
        warnings.filterwarnings(
            self.action,  # type: ignore[arg-type]  # it was taken from a valid filter
            message=self.message,
            category=self.category,
            module=self.module,
            lineno=self.line,
        )


def pack_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """Pickle a call and the warning filters in force; test modules go by value.

    Raises:
        TypeError, pickle.PicklingError: The function or an argument cannot be pickled.
    """
    with _unreachable_modules_by_value():
        return bytes(cloudpickle.dumps((fn, args, dict(kwargs), _warning_filters())))


def pack_value(value: Any) -> bytes:
    """Pickle a rank's return value."""
    return bytes(cloudpickle.dumps(value))


def pack_exception(error: BaseException) -> bytes:
    """Pickle an exception, or a `RemoteError` in its place if it does not survive pickling."""
    try:
        body = bytes(cloudpickle.dumps(error))
        cloudpickle.loads(body)
    except Exception:
        kind = type(error)
        return bytes(
            cloudpickle.dumps(RemoteError(f"{kind.__module__}.{kind.__qualname__}", str(error)))
        )
    return body


def unpack(body: bytes) -> Any:
    """Undo `pack_call`, `pack_value` or `pack_exception`.

    Raises:
        Exception: What the unpickled classes raise, or an import error.
    """
    return cloudpickle.loads(body)


def _warning_filters() -> list[WarningFilter]:
    return [
        WarningFilter(action, _pattern(message), category, _pattern(module), line)
        for action, message, category, module, line in warnings.filters
        if isinstance(category, type)
    ]


def _pattern(matcher: str | re.Pattern[str] | None) -> str:
    if matcher is None:
        return ""
    return matcher if isinstance(matcher, str) else matcher.pattern


@contextmanager
def _unreachable_modules_by_value() -> Iterator[None]:
    already = cloudpickle.list_registry_pickle_by_value()
    modules = [m for m in _unreachable_modules() if m.__name__ not in already]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _unreachable_modules() -> Iterator[ModuleType]:
    """Yield the modules that a rank could not import: test modules, conftest files.

    A file below the working directory does not count as importable for that alone: whether
    the working directory is searched depends on how pytest was started.
    """
    here = os.getcwd()
    roots = tuple(os.path.join(path, "") for path in sys.path if path not in ("", here))
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py") or file.startswith(roots):
            continue
        if getattr(module, "__name__", None) == name != "__main__":
            yield module
