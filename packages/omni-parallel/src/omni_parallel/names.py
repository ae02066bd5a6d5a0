"""Names of the packages below, found in whichever of them are installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

_CORE = ("omni_parallel.v1", "omni_parallel_state", "omni_group_coordinator")


def find_name(name: str) -> Any:
    """What one of the installed packages calls so.

    Raises:
        AttributeError: None does; says what is installed.
    """
    for package in _packages():
        module = import_module(package)
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
        deeper = _module_of(module, name)
        if deeper is not None:
            return deeper
    msg = (
        f"module 'omni_parallel' has no attribute {name!r}, and none of "
        f"{', '.join(_packages())} has it; a package that is not installed may: see "
        "omni_parallel.versions()"
    )
    raise AttributeError(msg)


def all_names() -> list[str]:
    """All names that `find_name` finds."""
    found = {name for package in _packages() for name in import_module(package).__all__}
    return sorted({"__version__", *(name for name in found if not name.startswith("_"))})


def _packages() -> list[str]:
    from omni_parallel.v1 import STRATEGY_GROUP

    found = (entry.module.partition(".")[0] for entry in entry_points(group=STRATEGY_GROUP))
    return list(dict.fromkeys([*_CORE, *sorted(found)]))


def _module_of(package: ModuleType, name: str) -> ModuleType | None:
    """A module of the package by its own name, as the seed's tree has them side by side."""
    if name.startswith("_") or name in sys.modules:
        return None
    try:
        return import_module(f"{package.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package.__name__}.{name}":
            raise
        return None
