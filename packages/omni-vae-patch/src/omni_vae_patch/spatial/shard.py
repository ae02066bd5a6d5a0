"""What one call of an autoencoder holds of its feature maps, and what it asks of its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    halo_exchange,
)
from omni_vae_patch.spatial.partition import Partition
from omni_vae_patch.spatial.posted import can_post, post_halo
from omni_vae_patch.spatial.steps import Step, Taken, with_length
from omni_vae_patch.spatial.traced import running, traced_gather, traced_halo


class SpatialShard:
    """This rank's rows during one call.

    Ranks without rows take no part: nothing here waits for them.

    Args:
        group: The ranks.
        partition: Their rows in the coarsest feature map; this rank has some.

    Attributes:
        partition: The rows of each rank.
        dim: Which side is sharded, counted from the end.
        frames: Of the feature map that a convolution made last, for masks of tokens of video.
        taken: What it has communicated, in order.
        key: Word for the calls that this one is of, in compiled code.
    """

    def __init__(self, group: GroupCoordinator, partition: Partition) -> None:
        self._group = group
        self.partition = partition
        self._rank = group.rank_in_group
        self._steps = 0
        self._draining: int | None = None
        self.taken: list[Taken] = []
        self.key = ""
        self._padding: tuple[str, int, int, int] | None = None
        self._posted: Callable[[], tuple[Tensor, Tensor]] | None = None
        self.dim = partition.dim
        self.frames = 1

    def run_as(self, key: str) -> None:
        """Let compiled code that knows this key communicate for this call."""
        self.key = key
        running[key] = self

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
        return self._rank == self.partition.active - 1

    @property
    def start(self) -> int:
        """This rank's first row of the coarsest feature map."""
        return self.partition.start(self._rank)

    @property
    def mine(self) -> int:
        """This rank's rows of the coarsest feature map."""
        return self.partition.rows[self._rank]

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
        return self.partition.at(local // self.mine)

    def check_reach(self, local: int, before: int, after: int, where: str) -> None:
        """Check that only the first and the last rank reach beyond the border of the whole.

        What stands there is put on their shards alone. The same on every rank.

        Args:
            local: Rows of a feature map on this rank.
            before: Rows that are wanted before each shard.
            after: Rows that are wanted after it.
            where: For messages.

        Raises:
            ParallelConfigError: Another one does.
        """
        rows = [length for length in self.lengths(local, where) if length]
        inner = range(1, len(rows))
        if any(sum(rows[:rank]) < before or sum(rows[-rank:]) < after for rank in inner):
            msg = (
                f"{where} reads {before} rows before and {after} after a shard, and the ranks have "
                f"{', '.join(map(str, rows))}: not only those at the borders would reach beyond "
                "them; legal: fewer ranks, the other side, a larger input, or mode='tile'"
            )
            raise ParallelConfigError(msg)

    # -- rows that a module has put around a shard ------------------------------------------

    def tell_padding(self, where: str, length: int, before: int, after: int) -> None:
        """Say how many rows a module has put before and after this shard."""
        self._padding = where, length, before, after

    def take_padding(self, length: int, where: str) -> tuple[int, int] | None:
        """The rows before and after a shard of so many in all; ``None`` if none were told of.

        Raises:
            ParallelConfigError: Other than these are left.
        """
        if self._padding is None or self._padding[1] != length:
            self.expect_no_padding(where)
            return None
        (_, _, *rows), self._padding = self._padding, None
        return rows[0], rows[1]

    def expect_no_padding(self, where: str) -> None:
        """Check that no module has put rows around the shard of which nobody has made use.

        Raises:
            ParallelConfigError: One has.
        """
        if self._padding is not None:
            msg = (
                f"{self._padding[0]} pads a shard, and {where} comes after it, which takes no such "
                "rows; legal: a convolution without padding of its own; or register a rule for "
                "its class (omni_vae_patch.register_rule), or use mode='tile'"
            )
            raise ParallelConfigError(msg)

    # -- communication ---------------------------------------------------------------------

    def halo(self, x: Tensor, before: int, after: int, where: str) -> tuple[Tensor, Tensor]:
        """The rows before and after this rank's, fewer at the borders of the whole."""
        lengths = self.lengths(x.shape[self.dim], where)
        step = self._halo_step(lengths, before, after)
        if torch.compiler.is_compiling() and self.key:
            first, last = traced_halo(x, self.key, self.dim, before, after, lengths, step.rows)
        else:
            first, last = self.take(step, x)
        return first, last

    def halo_meanwhile(
        self, x: Tensor, before: int, after: int, where: str
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """As `halo`, of which the rows are under way until what is returned is called.

        Before that, nothing else may be asked of the peers.
        """
        lengths = self.lengths(x.shape[self.dim], where)
        alone = torch.compiler.is_compiling() or self._draining is not None
        if alone or not can_post(lengths, before, after):
            rows = self.halo(x, before, after, where)
            return lambda: rows
        step = self._halo_step(lengths, before, after)
        wait = post_halo(self._group, x, self.dim, (step.rows[0], step.rows[1]), (before, after))
        if wait is None:
            rows = self.halo(x, before, after, where)
            return lambda: rows
        # Now, not after the wait: what is sent is not to be sent again, whatever fails meanwhile.
        self.taken.append((step, tuple(x.shape), x.dtype, x.device))
        self._posted = wait
        return self._arrived

    def _arrived(self) -> tuple[Tensor, Tensor]:
        if self._posted is None:
            msg = "no rows are under way"
            raise ParallelError(msg)
        wait, self._posted = self._posted, None
        return wait()

    def _halo_step(self, lengths: list[int], before: int, after: int) -> Step:
        stop = sum(lengths[: self._rank + 1])
        rows = (min(before, stop - lengths[self._rank]), min(after, sum(lengths) - stop))
        return Step(self.dim, before, after, lengths, rows)

    def gather(self, x: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """The tensors of all ranks with rows, joined; ``lengths`` says how much each has."""
        if torch.compiler.is_compiling() and self.key:
            joined: Tensor = traced_gather(x, self.key, dim, lengths, sum(lengths))
            return joined
        (whole,) = self.take(Step(dim, None, None, list(lengths), (sum(lengths),)), x)
        return whole

    def stack(self, x: Tensor) -> Tensor:
        """The tensors of all ranks with rows, of one shape, along a new first dimension."""
        lengths = [int(rank < self.partition.active) for rank in range(self._group.world_size)]
        return self.gather(x.unsqueeze(0), 0, lengths)

    def _communicate(self, step: Step, x: Tensor) -> Sequence[Tensor]:
        lengths = step.lengths
        if step.before is not None and step.after is not None:
            return halo_exchange(x, step.dim, step.before, step.after, self._group, lengths)
        if self.partition.active == self._group.world_size:
            return (self._group.all_gather(x, step.dim, lengths=lengths),)
        # A collective would wait for the ranks without rows: messages among the others.
        total = sum(lengths)
        before, after = halo_exchange(x, step.dim, total, total, self._group, lengths)
        return (torch.cat([before, x, after], step.dim),)

    # -- a call that failed on this rank ---------------------------------------------------

    def drain(self) -> None:
        """From now on, do nothing of what was done before, and communicate without content.

        For the rank whose call failed: it goes through the call once more without computing
        anything, so that its peers come to the end of theirs and learn of it.
        """
        if self._posted is not None:
            self._arrived()  # so that nothing is under way that nobody waits for
        self._draining = len(self.taken)
        self._steps = 0
        self._padding = None

    def replay(self, steps: Sequence[Taken]) -> None:
        """Communicate what is left of a call that another one like it has communicated.

        For the rank that cannot go through its call once more.
        """
        for step, shape, dtype, device in steps[max(len(self.taken), self._steps) :]:
            self._communicate(step, torch.zeros(shape, dtype=dtype, device=device))

    def take(self, step: Step, x: Tensor) -> Sequence[Tensor]:
        """Do a step with this rank's tensor; nothing but its kind counts while draining."""
        if torch.compiler.is_compiling():
            return self._communicate(step, x)
        if self._draining is None:
            found = self._communicate(step, x)
            # Not before: what failed before it was sent is still to be sent.
            self.taken.append((step, tuple(x.shape), x.dtype, x.device))
            return found
        self._steps += 1
        if self._steps > self._draining:
            shape, dtype, device = tuple(x.shape), x.dtype, x.device
            # In a thread of its own: what makes tensors without content here is thread-local.
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(
                    lambda: self._communicate(step, torch.zeros(shape, dtype=dtype, device=device))
                ).result()
        return [with_length(x, step.dim, rows) for rows in step.rows]
