"""Which dtype weights have that are loaded the ordinary way."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Those that numbers can be cast between; values of others are codes, or mean something else."""


def kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> tuple[str, ...]:
    """Names of modules and parameters that the model's class keeps in float32.

    Those of diffusers say so for every dtype, those of transformers of some for float16 only.
    """
    if dtype in (None, torch.float32):
        return ()
    names = _names(model, "_keep_in_fp32_modules")
    if hasattr(model, "_keep_in_fp32_modules_strict"):
        names = names if dtype is torch.float16 else set()
        names |= _names(model, "_keep_in_fp32_modules_strict")
    return tuple(sorted(names))


def _names(model: nn.Module, attribute: str) -> set[str]:
    names = getattr(model, attribute, None) or ()
    return {names} if isinstance(names, str) else set(names)


def is_kept(name: str, kept: Iterable[str]) -> bool:
    """Whether a dotted name lies in one of some modules."""
    parts = name.split(".")
    return any(module in parts for module in kept)


def converts(found: torch.dtype | None, wanted: torch.dtype) -> bool:
    """Whether values mean the same in both dtypes; those of codes need a scale."""
    return found == wanted or (found in PLAIN_DTYPES and wanted in PLAIN_DTYPES)
