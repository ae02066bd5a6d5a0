"""Where the image tokens of a call lie in a tensor that has elements for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The dimensions of a tensor along which the tokens lie, and the patches that they make.

    A tensor of this layout has a flat form, in which one axis takes the place of these dimensions:
    the elements of the first token, those of the second, and so on, in the model's order. A patch
    is a run of it. What treats each element alone gives the same in either form.

    Args:
        dims: Those dimensions, in order.
        lengths: How long they are.
        sizes: How many elements of each belong to one token.
        bounds: Tokens at which patches begin, and their number at the end.
    """

    dims: tuple[int, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    bounds: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis of the flat form along which the tokens lie."""
        return self.dims[0]

    @property
    def patches(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    @property
    def is_packed(self) -> bool:
        """Whether a tensor is its own flat form."""
        return len(self.dims) == 1 and self.sizes == (1,)

    def fits(self, shape: torch.Size) -> bool:
        """Whether a tensor of this shape has such tokens, each of them whole."""
        if self.dims[-1] >= len(shape) or tuple(shape[dim] for dim in self.dims) != self.lengths:
            return False
        cut = any(length % size for length, size in zip(self.lengths, self.sizes, strict=True))
        return not cut and self.tokens == self.bounds[-1]

    @property
    def tokens(self) -> int:
        """How many tokens the dimensions hold."""
        return math.prod(n // size for n, size in zip(self.lengths, self.sizes, strict=True))

    def moved(self, dims: tuple[int, ...]) -> TokenLayout:
        """The same tokens in other dimensions."""
        return replace(self, dims=dims)

    def flat_dim(self, dim: int) -> int | None:
        """Where a dimension is in the flat form; ``None`` for one of the tokens."""
        if dim in self.dims:
            return None
        return dim - sum(1 for one in self.dims[1:] if one < dim)

    def flat_shape(self, shape: torch.Size) -> list[int]:
        """Shape of the flat form."""
        found = [n for dim, n in enumerate(shape) if dim not in self.dims]
        found.insert(self.axis, math.prod(self.lengths))
        return found

    def flat(self, whole: Tensor) -> Tensor:
        """The flat form of a tensor; of one that is packed, itself."""
        if self.is_packed:
            return whole
        shape, order = self._split(whole.shape)
        return whole.reshape(shape).permute(order).reshape(self.flat_shape(whole.shape))

    def whole(self, flat: Tensor) -> Tensor:
        """The tensor that a flat form is of, contiguous."""
        if self.is_packed:
            return flat.contiguous()
        lengths = list(flat.shape)
        lengths[self.axis : self.axis + 1] = [1]
        for dim, length in zip(self.dims, self.lengths, strict=True):
            if dim == self.axis:
                lengths[dim] = length
            else:
                lengths.insert(dim, length)
        shape, order = self._split(torch.Size(lengths))
        back = [order.index(dim) for dim in range(len(order))]
        return flat.reshape([shape[dim] for dim in order]).permute(back).reshape(lengths)

    def _split(self, shape: torch.Size) -> tuple[list[int], list[int]]:
        """Shape with each dimension of tokens cut in two, and what brings these together."""
        found: list[int] = []
        grid, inner, others = [], [], []
        for dim, length in enumerate(shape):
            if dim in self.dims:
                size = self.sizes[self.dims.index(dim)]
                grid.append(len(found))
                inner.append(len(found) + 1)
                found += [length // size, size]
            else:
                others.append(len(found))
                found.append(length)
        return found, [*others[: self.axis], *grid, *inner, *others[self.axis :]]

    def patch(self, flat: Tensor, index: int) -> Tensor:
        """A patch of a flat form."""
        each = math.prod(self.sizes)
        start, stop = self.bounds[index] * each, self.bounds[index + 1] * each
        return flat.narrow(self.axis, start, stop - start)

    def patch_shape(self, shape: torch.Size, index: int) -> list[int]:
        """Shape of a patch of a tensor of this shape."""
        found = self.flat_shape(shape)
        found[self.axis] = (self.bounds[index + 1] - self.bounds[index]) * math.prod(self.sizes)
        return found
