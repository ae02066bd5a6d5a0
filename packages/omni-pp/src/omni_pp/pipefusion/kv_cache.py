"""Keys and values of the step before, of the blocks of this rank."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from omni_group_coordinator import ParallelError


class KeyValueCache:
    """What one guidance branch of one denoiser keeps from step to step.

    Every attention of this rank's blocks has keys and values of all tokens, text and image, in the
    layout of its call. A patch writes its own tokens and the text into them, and attends to all.

    Attributes:
        kind: What the calls that fill it have in common.
        steps: How many steps were computed exactly since it was made.
        last: Index of the step that was computed last.
    """

    def __init__(self, kind: Hashable) -> None:
        self.kind = kind
        self.steps = 0
        self.last = -1
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(tensor.nbytes for pair in self._pairs.values() for tensor in pair)

    def room(
        self, name: str, like: tuple[Tensor, Tensor], dim: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of an exact step, to write all of them.

        Args:
            name: Of the attention.
            like: Some of them.
            dim: Dimension of the tokens.
            length: How many tokens there are.
        """
        kept = self._pairs.get(name)
        shapes = [(*one.shape[:dim], length, *one.shape[dim + 1 :]) for one in like]
        if kept is None or not all(map(_fits, kept, like, shapes)):
            kept = like[0].new_empty(shapes[0]), like[1].new_empty(shapes[1])
            self._pairs[name] = kept
        return kept

    def kept(self, name: str) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, to write into.

        Raises:
            ParallelError: No exact step has filled them.
        """
        if name not in self._pairs:
            msg = f"the cache of {name} is empty: no exact step went before"
            raise ParallelError(msg)
        return self._pairs[name]


def _fits(kept: Tensor, new: Tensor, shape: tuple[int, ...]) -> bool:
    if kept.is_inference() != torch.is_inference_mode_enabled() or (*kept.shape,) != shape:
        return False
    return (kept.dtype, kept.device) == (new.dtype, new.device)
