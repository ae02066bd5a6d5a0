"""Modules of the names that diffusion code knows, whose contents are in the packages below."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def forward(module: str, distribution: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a module needs to have all names of another one, which it imports when it is asked.

    Args:
        module: The other one.
        distribution: What to install for it.

    Returns:
        The ``__getattr__`` and the ``__dir__`` of the module.
    """

    def load() -> Any:
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            package = module.partition(".")[0]
            if error.name != package:
                raise
            msg = f"{package} is not installed; try: pip install {distribution}"
            raise ModuleNotFoundError(msg, name=package) from None

    def public() -> list[str]:
        found = load()
        names = getattr(found, "__all__", None) or [n for n in dir(found) if not n.startswith("_")]
        return sorted(names)

    def get(name: str) -> Any:
        if name == "__all__":
            return public()
        if name.startswith("__"):  # of Python's own, such as __path__
            raise AttributeError(name)
        return getattr(load(), name)

    return get, public
