"""Values and results that the tests of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Output:
    """As diffusers returns it with ``return_dict=True``."""

    sample: Any


def same(found: Any, expected: Any) -> None:
    """Equal in every element, type and dtype."""
    assert type(found).__qualname__ == type(expected).__qualname__
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, Output):
        same(found.sample, expected.sample)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


def text_of(call: Callable[[], Any]) -> str:
    """The error that a call ends with."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
