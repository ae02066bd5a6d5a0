"""What one call of an autoencoder holds of its feature maps, and what it asks of its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError, halo_exchange
from omni_vae_patch.spatial.partition import Partition

Shape = tuple[int, ...]


class SpatialShard:
    """This rank's rows during one call.

    Ranks without rows take no part: nothing here waits for them.

    Args:
        group: The ranks.
        partition: Their rows in the coarsest feature map; this rank has some.

    Attributes:
        dim: Which side is sharded, counted from the end.
        frames: Of the feature map that a convolution made last, for masks of tokens of video.
    """

    def __init__(self, group: GroupCoordinator, partition: Partition) -> None:
        self._group = group
        self._partition = partition
        self._rank = group.rank_in_group
        self._steps = 0
        self._draining: int | None = None
        self.dim = partition.dim
        self.frames = 1

    @property
    def rank(self) -> int:
        """This rank, among those of the group."""
        return self._rank

    @property
    def is_first(self) -> bool:
        """Whether this rank has the border at the beginning."""
        return self._rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the border at the end."""
        return self._rank == self._partition.active - 1

    @property
    def start(self) -> int:
        """This rank's first row of the coarsest feature map."""
        return self._partition.start(self._rank)

    @property
    def mine(self) -> int:
        """This rank's rows of the coarsest feature map."""
        return self._partition.rows[self._rank]

    def lengths(self, local: int, where: str) -> list[int]:
        """Each rank's share of something of which this rank holds so much.

        Args:
            local: Rows of a feature map, or tokens, on this rank.
            where: For messages.

        Raises:
            ParallelError: It is no multiple of this rank's rows.
        """
        if local % self.mine:
            msg = (
                f"{where} has {local} rows on this rank, no multiple of the {self.mine} rows that "
                "it holds of the latent; this side of the autoencoder cannot be sharded"
            )
            raise ParallelError(msg)
        return self._partition.at(local // self.mine)

    # -- communication ---------------------------------------------------------------------

    def halo(self, x: Tensor, before: int, after: int, where: str) -> tuple[Tensor, Tensor]:
        """The rows before and after this rank's, fewer at the borders of the whole."""
        lengths = self.lengths(x.shape[self.dim], where)
        stop = sum(lengths[: self._rank + 1])
        rows = (min(before, stop - lengths[self._rank]), min(after, sum(lengths) - stop))
        first, last = self._step(
            x,
            [_with_length(x, self.dim, count) for count in rows],
            lambda y: halo_exchange(y, self.dim, before, after, self._group, lengths),
        )
        return first, last

    def gather(self, x: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """The tensors of all ranks with rows, joined; ``lengths`` says how much each has."""
        (whole,) = self._step(
            x,
            [_with_length(x, dim, sum(lengths))],
            lambda y: (self._gathered(y, dim, lengths),),
        )
        return whole

    def _gathered(self, x: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        if self._partition.active == self._group.world_size:
            return self._group.all_gather(x, dim, lengths=lengths)
        # A collective would wait for the ranks without rows: messages among the others.
        before, after = halo_exchange(x, dim, sum(lengths), sum(lengths), self._group, lengths)
        return torch.cat([before, x, after], dim)

    def stack(self, x: Tensor) -> Tensor:
        """The tensors of all ranks with rows, of one shape, along a new first dimension."""
        lengths = [int(rank < self._partition.active) for rank in range(self._group.world_size)]
        return self.gather(x.unsqueeze(0), 0, lengths)

    # -- a call that failed on this rank ---------------------------------------------------

    def drain(self) -> None:
        """From now on, do nothing of what was done before, and communicate without content.

        For the rank whose call failed: it goes through the call once more without computing
        anything, so that its peers come to the end of theirs and learn of it.
        """
        self._draining = self._steps
        self._steps = 0

    def _step(
        self, x: Tensor, shapes: Sequence[Shape], communicate: Callable[[Tensor], Sequence[Tensor]]
    ) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return communicate(x)
        if self._draining is None:
            found = communicate(x)
            self._steps += 1  # not before: what failed before it was sent is still to be sent
            return found
        self._steps += 1
        if self._steps > self._draining:
            shape, dtype, device = tuple(x.shape), x.dtype, x.device
            # In a thread of its own: what makes tensors without content here is thread-local.
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(
                    lambda: communicate(torch.zeros(shape, dtype=dtype, device=device))
                ).result()
        return [x.new_empty(shape) for shape in shapes]


def _with_length(x: Tensor, dim: int, length: int) -> Shape:
    shape = list(x.shape)
    shape[dim] = length
    return tuple(shape)
