"""What ranks with rows do at once in a call, so that it can be done again without content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Something that all ranks with rows do at once.

    Attributes:
        dim: Of the tensor, along which they hold parts of a whole.
        before: Rows wanted before a part; ``None``: the whole is.
        after: Rows wanted after it.
        lengths: Of each rank's part.
        rows: Of each tensor that this rank gets.
    """

    dim: int
    before: int | None
    after: int | None
    lengths: list[int]
    rows: tuple[int, ...]


Taken = tuple[Step, tuple[int, ...], torch.dtype, torch.device]
"""A step that was done, and this rank's tensor in it."""


def with_length(x: Tensor, dim: int, length: int) -> Tensor:
    """A tensor like another one, of a length along a dimension, and no matter of what content."""
    shape = list(x.shape)
    shape[dim] = length
    return x.new_empty(shape)
