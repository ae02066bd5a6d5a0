"""A typed form of ``torch.compiler.disable``, which torch leaves untyped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def outside_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that, with all that it calls, runs eagerly under torch.compile.

    Not a decorator: it loads torch's compiler, which takes a second that an import should not.
    """
    reason = "omni-sp 0.1 communicates outside of traces"
    eager: Callable[..., Any] = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
    return eager
