"""Results of calls for some of the rows of a batch: taken from a whole one, joined, compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omni_parallel_state.denoising.structure import describe, rebuild, tensors_in

# Relative to the largest value: other batch sizes take other kernels, which round otherwise.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION = 5e-2


def is_part(part: Any, whole: Any, start: int, stop: int, rows: int) -> bool:
    """Whether a result equals its rows of the whole one, but for what rounding may do."""
    if type(part) is not type(whole):
        return False
    found, expected = tensors_in(part), tensors_in(rows_of(whole, start, stop, rows))
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.numel():
        return True
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    tolerance = _TOLERANCES.get(expected.dtype, _LOW_PRECISION)
    largest = expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance * largest)


def rows_of(whole: Any, start: int, stop: int, rows: int) -> Any:
    """The part of a call's result that is for some of the rows."""
    if isinstance(whole, Tensor):
        if not whole.ndim:
            return whole.new_empty(0)  # a number about all of the rows has none
        share = whole.shape[0] // rows
        return whole[start * share : stop * share]
    if isinstance(whole, list):
        return whole[start:stop]
    if type(whole) is tuple:
        return tuple(rows_of(item, start, stop, rows) for item in whole)
    tensors = [rows_of(tensor, start, stop, rows) for tensor in tensors_in(whole)]
    return rebuild(describe(whole), iter(tensors))


def joined(parts: list[Any]) -> Any:
    """The result of a call, of the results for its rows in order."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if type(first) is tuple:
        return tuple(joined(list(items)) for items in zip(*parts, strict=True))
    tensors = map(joined, map(list, zip(*map(tensors_in, parts), strict=True)))
    return rebuild(describe(first), iter(tensors))
