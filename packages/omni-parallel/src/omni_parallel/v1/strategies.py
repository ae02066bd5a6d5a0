"""Strategies are found by entry point, so that any subset of the packages may be installed."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, Protocol, Self, runtime_checkable

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelState

STRATEGY_GROUP = "omni_parallel.v1.strategies"
"""Entry-point group; the version of the API is part of its name."""

# What to install for the strategies of this project; others name themselves.
_PACKAGES = {
    "sp": "omni-sp",
    "cfgp": "omni-cfgp",
    "pp": "omni-pp",
    "pipefusion": "omni-pp",
    "hsdp": "omni-hsdp",
    "vae_patch": "omni-vae-patch",
}


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
        ParallelConfigError: It is not installed, or what is installed is no strategy.
    """
    for entry in entry_points(group=STRATEGY_GROUP):
        if entry.name == name:
            strategy = entry.load()
            if isinstance(strategy, Strategy):
                return strategy
            msg = f"entry point {entry.value!r} of strategy {name!r} is no strategy: {strategy!r}"
            raise ParallelConfigError(msg)
    installed = ", ".join(available_strategies()) or "none"
    remedy = f"; try: pip install {_PACKAGES[name]}" if name in _PACKAGES else ""
    msg = f"strategy {name!r} is not installed (installed: {installed}){remedy}"
    raise ParallelConfigError(msg)
