"""Predictions of guidance branches, which must fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_group_coordinator import ParallelError


def check_alike(predictions: Sequence[Any]) -> None:
    """Check that the predictions of guidance branches can be combined.

    Args:
        predictions: Tensors, or tuples of tensors.

    Raises:
        ParallelError: Their shapes or dtypes differ.
    """
    found = [
        [(tuple(t.shape), t.dtype) for t in (p if isinstance(p, tuple) else (p,))]
        for p in predictions
    ]
    if any(one != found[0] for one in found):
        lines = [
            f"  branch {index}: "
            + ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in one)
            for index, one in enumerate(found)
        ]
        msg = "the guidance branches predict different shapes or dtypes:\n" + "\n".join(lines)
        raise ParallelError(msg)
