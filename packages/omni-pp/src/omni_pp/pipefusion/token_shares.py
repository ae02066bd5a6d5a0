"""Which image tokens of a patch each rank of a sequence-parallel group has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, split_sizes


def share_bounds(start: int, stop: int, text: int, ranks: int) -> tuple[int, ...]:
    """Image tokens at which the shares of a patch begin, and where the last one ends.

    The first rank has the text beside its image tokens, so it has fewer of these; each has one at
    least.

    Args:
        start: First image token of the patch.
        stop: One past its last one; there are ``ranks`` in it at least.
        text: Text tokens that go with it.
        ranks: How many share it.
    """
    if ranks == 1:
        return start, stop
    length = stop - start
    first = max(split_sizes(text + length, ranks)[0] - text, 1)
    return tuple(accumulate([start, first, *split_sizes(length - first, ranks - 1)]))


class TokenShares:
    """The image tokens of a patch, of which each rank of a group has its own.

    Args:
        bounds: Image tokens at which shares begin, and where the last one ends.
        group: The ranks; ``None``: this one has all.

    Attributes:
        start: First image token of the patch.
        stop: One past its last one.
        own: The same of what this rank has.
    """

    def __init__(self, bounds: tuple[int, ...], group: GroupCoordinator | None = None) -> None:
        self._group = group
        self.spans = list(pairwise(bounds))
        self.start, self.stop = bounds[0], bounds[-1]
        self.own = self.spans[0 if group is None else group.rank_in_group]

    @property
    def length(self) -> int:
        """Image tokens of the patch."""
        return self.stop - self.start

    def own_part(self, patch: Tensor, dim: int) -> Tensor:
        """What this rank has of a tensor with the tokens of the patch."""
        return patch.narrow(dim, self.own[0] - self.start, self.own[1] - self.own[0])

    def joined(self, own: Tensor, dim: int) -> Tensor:
        """The tensor of which each rank has its own part."""
        if self._group is None:
            return own
        return self._group.all_gather(own, dim, lengths=self._lengths())

    def of_all(self, pair: tuple[Tensor, Tensor], dim: int, text: int) -> list[Sequence[Tensor]]:
        """Keys and values of each rank.

        Args:
            pair: This rank's keys and values: of its image tokens, and of its text if it has any.
            dim: Dimension of the tokens.
            text: Text tokens of the first rank.
        """
        if self._group is None:
            return [pair]
        lengths = self._lengths()
        lengths[0] += text
        if pair[0].shape == pair[1].shape:  # in one message
            stacked = torch.stack(pair)
            return [
                piece.unbind()
                for piece in self._group.all_gather(
                    stacked, dim + 1, separate_tensors=True, lengths=lengths
                )
            ]
        gathered = [
            self._group.all_gather(one, dim, separate_tensors=True, lengths=lengths) for one in pair
        ]
        return list(zip(*gathered, strict=True))

    def from_first(self, own: Tensor) -> Tensor:
        """A tensor of the first rank, on all of them; the others give one of its shape."""
        return own if self._group is None else self._group.broadcast(own.contiguous())

    def _lengths(self) -> list[int]:
        return [stop - start for start, stop in self.spans]
