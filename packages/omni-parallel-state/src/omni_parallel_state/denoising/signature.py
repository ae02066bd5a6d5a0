"""What calls of a denoiser have in common: everything that decides the shape of the result."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

_SAMPLES, _STEP = 64, 1_000_003
_TIMES = ("timestep", "timesteps", "t")  # change from step to step, and never a shape


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """A key that is equal for calls whose results have the same shapes; the same on every rank.

    Args:
        args: Positional arguments of the call.
        kwargs: Named ones.
    """
    named = ((name, _key(value, name)) for name, value in sorted(kwargs.items()))
    return tuple(_key(value) for value in args), tuple(named)


def _key(value: object, name: str = "") -> Hashable:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if isinstance(value, float) or (name in _TIMES and not isinstance(value, tuple | list | dict)):
        return type(value).__name__
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _key(item)) for key, item in value.items())
    return type(value).__qualname__


def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """How much work a call is, relative to others of the same denoiser: its rows times tokens.

    Never zero: of calls that cost nothing one rank would be given all.
    """
    values = [*args, *kwargs.values()]
    return float(sum(_tokens(value) for value in values if isinstance(value, Tensor)) or 1)


def _tokens(tensor: Tensor) -> int:
    if tensor.ndim == 3:  # (batch, tokens, width)
        return tensor.shape[0] * tensor.shape[1]
    if tensor.ndim in (4, 5):  # (batch, channels, ..., height, width)
        return tensor.numel() // max(tensor.shape[1], 1)
    return 0


def fingerprint(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    """Some elements of each input of floating point, to see whether ranks were given the same.

    Waits for the device, once for each input.
    """
    values = [*args, *(value for _, value in sorted(kwargs.items()))]
    found: list[float] = []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            flat = value.detach().reshape(-1)
            # Spread over the whole, by a step that shares no factor with any usual dimension.
            places = torch.arange(_SAMPLES, device=flat.device) * _STEP % flat.numel()
            found += [float(flat.numel()), *flat[places].to(torch.float64).tolist()]
    return tuple(found)


def same_inputs(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two fingerprints are those of inputs that are equal but for rounding."""
    if len(one) != len(other):
        return False
    width = _SAMPLES + 1
    for i in range(0, len(one), width):
        (count, *found), (counted, *expected) = one[i : i + width], other[i : i + width]
        finite = [abs(value) for value in expected if math.isfinite(value)]
        slack = 1e-2 * math.sqrt(sum(value * value for value in finite) / max(1, len(finite)))
        if count != counted or not all(map(partial(_near, slack), found, expected)):
            return False
    return True


def _near(slack: float, one: float, other: float) -> bool:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= slack
    return one == other or (math.isnan(one) and math.isnan(other))  # of masks, for one
