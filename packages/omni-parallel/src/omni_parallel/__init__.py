"""Diffusion models on several GPUs: every strategy of omni-parallel behind one versioned API.

The names below are those of `omni_parallel.v1`. The public names of the installed packages are
found here too, so that ``omni_parallel.get_sp_group`` is that of omni-parallel-state. Nothing is
imported before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omni_parallel.__about__ import __version__

if TYPE_CHECKING:
    from omni_parallel.v1 import (
        ModelFacts,
        ParallelConfig,
        Parallelized,
        auto_config,
        available_strategies,
        explain,
        load_strategy,
        parallelize,
        versions,
    )

    __all__ = [
        "ModelFacts",
        "ParallelConfig",
        "Parallelized",
        "__version__",
        "auto_config",
        "available_strategies",
        "explain",
        "load_strategy",
        "parallelize",
        "versions",
    ]


def __getattr__(name: str) -> Any:
    if name == "__all__":  # of the packages that are installed, for ``import *``
        return __dir__()
    if name.startswith("__"):  # of Python's own, such as __path__
        msg = f"module 'omni_parallel' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec(f"{__name__}.{name}") is not None:  # a module of this package
        return import_module(f"{__name__}.{name}")
    from omni_parallel.names import find_name

    found = find_name(name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    from omni_parallel.names import all_names

    return all_names()
