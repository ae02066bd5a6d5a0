"""Strategies are found by entry point, so that any subset of the packages may be installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Protocol, Self, runtime_checkable

from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1.installed_packages import API, PACKAGES, check_package, unknown_api
from omni_parallel_state import ParallelState

STRATEGY_GROUP = f"omni_parallel.v{API}.strategies"
"""Entry-point group; the version of the API is part of its name."""


@runtime_checkable
class Handle(Protocol):
    """Undoes a strategy; also a context manager that does so at its end."""

    def remove(self) -> None:
        """Give the model back as it was; a second call does nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class Strategy(Protocol):
    """One way of splitting a model's work over ranks."""

    name: str
    """Its name among the entry points."""

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Make a pipeline or module parallel, with the degrees of the state's layout.

        Args:
            target: A pipeline of diffusers, or a module.
            state: The ranks.
            options: What the strategy can be told beyond the degrees: fields of its own
                configuration.

        Raises:
            ParallelConfigError: The target cannot be split so, or an option is none.
        """


def available_strategies() -> tuple[str, ...]:
    """Names of the strategies that are installed, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=STRATEGY_GROUP)}))


def load_strategy(name: str) -> Strategy:
    """The installed strategy of this name.

    Raises:
        ParallelConfigError: It is not installed, or what is installed is no strategy or of a
            version that does not go together with this package.
    """
    for entry in entry_points(group=STRATEGY_GROUP):
        if entry.name == name:
            check_package(name, entry.dist)
            strategy = entry.load()
            if isinstance(strategy, Strategy):
                return strategy
            msg = f"entry point {entry.value!r} of strategy {name!r} is no strategy: {strategy!r}"
            raise ParallelConfigError(msg)
    raise ParallelConfigError(unknown_api(name) or missing_text(name))


def missing_text(name: str) -> str:
    """What to say of a strategy that is not installed."""
    installed = ", ".join(available_strategies()) or "none"
    remedy = f"; try: pip install {PACKAGES[name]}" if name in PACKAGES else ""
    return f"strategy {name!r} is not installed (installed: {installed}){remedy}"
