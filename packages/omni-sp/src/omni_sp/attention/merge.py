"""Joining attention over parts of the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class MergedAttention:
    """Attention of some queries to keys that come in parts, in any order.

    Of each part it takes the output and the log-sum-exp of its scores; the weights of the parts
    follow from the latter (online softmax, as in arXiv 2112.05682). A part with nothing to attend
    to has a log-sum-exp of ``-inf`` and no weight.

    Args:
        dtype: What is merged in; float32 keeps the error from growing with the number of parts.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Take one part.

        Args:
            out: ``(batch, sequence, heads, head_dim)``.
            lse: ``(batch, sequence, heads)``.
        """
        lse = lse.to(self._dtype)
        if self._out is None or self._lse is None:
            self._out, self._lse = out.to(self._dtype), lse
            return
        total = torch.logaddexp(self._lse, lse)
        # Of the difference, not of the total: scores may be so low that the total absorbs it.
        weight = torch.sigmoid(lse - self._lse)
        weight = weight.masked_fill(total == -math.inf, 0.0)  # neither part attends to anything
        # Not in place: the first output may still belong to a kernel.
        self._out = torch.lerp(self._out, out.to(self._dtype), weight.unsqueeze(-1))
        self._lse = total

    def result(self, dtype: torch.dtype) -> Tensor | None:
        """What the parts give together; ``None`` if there was none."""
        return None if self._out is None else self._out.to(dtype)
