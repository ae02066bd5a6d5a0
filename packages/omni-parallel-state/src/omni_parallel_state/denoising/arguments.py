"""The arguments of a denoiser's call: whether the call may change them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def writes_elsewhere(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may leave something behind in its arguments, such as keys in a cache.

    By the name, or because an argument is neither a tensor nor plain data.
    """
    caches = ("cache" in name and not isinstance(v, _PLAIN) for name, v in kwargs.items())
    return any(caches) or not all(_is_data(value) for value in (*args, *kwargs.values()))


def _is_data(value: object) -> bool:
    if isinstance(value, (Tensor, *_PLAIN)):
        return True
    if isinstance(value, tuple | list):
        return all(_is_data(item) for item in value)
    if isinstance(value, Mapping):
        return all(_is_data(item) for item in value.values())
    return type(value).__module__ in ("torch", "numpy")
