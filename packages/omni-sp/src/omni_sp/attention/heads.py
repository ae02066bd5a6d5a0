"""Which heads each rank of a Ulysses group computes, and with which key and value heads."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError, split_sizes


class HeadShare(NamedTuple):
    """The heads of one rank: half-open ranges of query heads and of key/value heads."""

    start: int
    stop: int
    kv_start: int
    kv_stop: int

    @property
    def size(self) -> int:
        """Query heads."""
        return self.stop - self.start

    @property
    def kv_size(self) -> int:
        """Key and value heads."""
        return self.kv_stop - self.kv_start


@lru_cache(maxsize=1024)
def head_shares(heads: int, kv_heads: int, world_size: int) -> tuple[HeadShare, ...]:
    """Balanced shares of the query heads, each with the key/value heads that they attend to.

    Nobody computes a head that does not exist: where heads do not divide, some ranks have one
    more; where there are fewer heads than ranks, some have none. A key/value head goes, as it is
    and not repeated, to each rank that has a query head of its group.

    Raises:
        ParallelConfigError: The query heads are no multiple of the key/value heads.
    """
    check_grouping(heads, kv_heads)
    group = heads // kv_heads
    sizes = split_sizes(heads, world_size)
    shares = []
    for size, stop in zip(sizes, accumulate(sizes), strict=True):
        start = stop - size
        kv_start = start // group
        shares.append(HeadShare(start, stop, kv_start, -(-stop // group) if size else kv_start))
    return tuple(shares)


def check_grouping(heads: int, kv_heads: int) -> None:
    """Check that query heads can be grouped over key/value heads.

    Raises:
        ParallelConfigError: They cannot; names the numbers of key/value heads that would do.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        msg = (
            f"{heads} query heads cannot be grouped over {kv_heads} key/value heads; legal here: "
            f"{', '.join(map(str, legal)) or 'at least one head of each'}"
        )
        raise ParallelConfigError(msg)


def paired(tensor: Tensor, share: HeadShare, heads: int, kv_heads: int) -> Tensor:
    """Key or value heads of a share in the form that a kernel with grouped heads pairs right.

    A kernel gives each key/value head the same number of query heads. Where a share cuts through
    groups, its key/value heads are repeated locally, one for each query head.

    Args:
        tensor: ``(batch, sequence, share.kv_size, head_dim)``.
        share: The heads.
        heads: Query heads of the model.
        kv_heads: Key/value heads of the model.
    """
    group = heads // kv_heads
    whole_groups = share.start % group == 0 and share.stop % group == 0
    if group == 1 or share.kv_size <= 1 or whole_groups:
        return tensor
    parts = [
        tensor[:, :, head // group - share.kv_start].unsqueeze(2)
        for head in range(share.start, share.stop)
    ]
    return torch.cat(parts, 2)
