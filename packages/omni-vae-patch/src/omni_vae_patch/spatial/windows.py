"""Windows that move along a sharded side: which rows they read, and whether they stay in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.spatial.shard import SpatialShard

REMEDY = "register a rule for its class (omni_vae_patch.register_rule), or use mode='tile'"


@dataclass(frozen=True)
class Window:
    """How a module moves along one side.

    Attributes:
        kernel: Rows from the first to the last that it reads at once, dilation included.
        stride: Rows from one output to the next.
        before: Rows that the module itself puts before the first.
        after: Rows that it puts after the last.
        ceil: Whether the last window may reach beyond these.
    """

    kernel: int
    stride: int
    before: int = 0
    after: int = 0
    ceil: bool = False

    def outputs(self, length: int) -> int:
        """Rows that come of so many, by torch's arithmetic."""
        room = length + self.before + self.after - self.kernel
        if not self.ceil:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        # The last window must begin within the rows or before them.
        return count - int((count - 1) * self.stride >= length + self.before)

    def end(self, length: int) -> int:
        """Rows to be put after the last, so that no window reaches beyond them."""
        reach = (self.outputs(length) - 1) * self.stride + self.kernel
        return max(0, reach - length - self.before)

    @property
    def beyond(self) -> int:
        """Rows of the next shard that the last window of a shard reads."""
        return max(0, self.kernel - self.stride - self.before)

    def check(self, lengths: Sequence[int], where: str) -> None:
        """Check that each rank's rows give rows of its own, and no others.

        Args:
            lengths: Rows of each rank.
            where: The module, for messages.

        Raises:
            ParallelConfigError: On every rank alike: they do not.
        """
        if any(length % self.stride for length in lengths):
            msg = (
                f"{where} makes one row of {self.stride}, and the ranks have {list(lengths)} rows, "
                f"not all of them multiples of {self.stride}; {REMEDY}"
            )
            raise ParallelConfigError(msg)
        total = sum(lengths)
        found, expected = self.outputs(total), total // self.stride
        if found != expected:
            least = max(0, self.kernel - self.stride)
            msg = (
                f"{where} makes {found} rows of {total}, where shards need {expected} to stay in "
                f"step; legal: padding of {least} to {self.kernel - 1} rows in all instead of "
                f"{self.before + self.after}; or {REMEDY}"
            )
            raise ParallelConfigError(msg)


def reached(
    x: Tensor, shard: SpatialShard, before: int, after: int, where: str, fill: float | None
) -> Tensor:
    """A shard with the rows before and after it.

    Args:
        x: The shard.
        shard: Where it is.
        before: Rows to be put before it.
        after: Rows to be put after it.
        where: The module, for messages.
        fill: What stands beyond the border of the whole; ``None``: its outermost row.
    """
    if not (before or after):
        return x
    dim = shard.dim
    first, last = shard.halo(x, before, after, where)
    joined = torch.cat([first, x, last], dim)
    missing = (before - first.shape[dim], after - last.shape[dim])
    if not any(missing):
        return joined
    amounts = [0, 0] * (x.ndim - 2)
    at = 2 * (-1 - dim)
    amounts[at : at + 2] = missing
    if fill is None:
        return pad(joined, amounts, mode="replicate")
    return pad(joined, amounts, value=fill)


def wrapped(x: Tensor, shard: SpatialShard, before: int, after: int) -> tuple[Tensor, Tensor]:
    """The rows before and after a shard of a whole that goes on at its other end.

    Every rank has as many rows as are asked for.
    """
    dim = shard.dim
    edges = torch.cat([x.narrow(dim, 0, after), x.narrow(dim, x.shape[dim] - before, before)], dim)
    ranks = shard.stack(edges)
    previous, following = ranks[shard.rank - 1], ranks[(shard.rank + 1) % ranks.shape[0]]
    return previous.narrow(dim, after, before), following.narrow(dim, 0, after)


def sides(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """An option of a module for each of its sides."""
    return (value,) * count if isinstance(value, int) else tuple(value)
