"""Names of the packages below, found in whichever of them are installed."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
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
