"""When the weights of blocks are gathered and given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from omni_group_coordinator import ParallelConfigError

Keep = Literal["none", "last", "all"]
"""Which blocks keep their weights after their forward."""


@dataclass(frozen=True)
class GatherPolicy:
    """When the weights of blocks are gathered and given up.

    Memory, beside a rank's share: ``prefetch + 1`` blocks, at least two, and what is in no block.

    Raises:
        ParallelConfigError: A value is not among the legal ones.
    """

    prefetch: int = 1
    """How many of the next blocks are gathered while one computes; 0 gathers each when it is
    called. The order is that of the last forward; in the first one it is that of the list in
    which the blocks stand."""

    keep: Keep = "none"
    """``"none"``: each block is given up after its forward. ``"last"``: all but the last.
    ``"all"``: no block, so that weights are gathered by the first forward and stay until
    `release`."""

    cpu_offload: bool = False
    """Hold the shares of the blocks in host memory, and copy them to the device to gather. Such a
    model is not moved with ``to()``."""

    def __post_init__(self) -> None:
        if type(self.prefetch) is not int or self.prefetch < 0:
            msg = f"prefetch={self.prefetch!r} is no number of blocks; legal: 0 and above"
            raise ParallelConfigError(msg)
        if self.keep not in get_args(Keep):
            legal = ", ".join(map(repr, get_args(Keep)))
            msg = f"keep={self.keep!r}; legal: {legal}"
            raise ParallelConfigError(msg)


def peak_bytes(root: int, blocks: list[int], prefetch: int) -> int:
    """The most that is gathered at once in a forward that gives each block up.

    While a block's pieces are copied into its weights, it takes its size twice; while it
    computes, the next ones stand beside it.

    Args:
        root: Bytes of what is in no block.
        blocks: Bytes of each block, in the order of their calls.
        prefetch: As in `GatherPolicy`.
    """
    worst = 2 * root
    for index, size in enumerate(blocks):
        ahead = blocks[index + 1 : index + 1 + prefetch]
        copying = 2 * size + sum(ahead[:-1] if len(ahead) == prefetch else ahead)
        worst = max(worst, root + max(copying, size + sum(ahead)))
    return worst


def policy_for(
    free: int, root: int, blocks: list[int], *, deepest: int = 2, spare: float = 0.25
) -> GatherPolicy:
    """The fastest policy that some free memory allows.

    Everything stays gathered if there is room for it; else as many of the next blocks are
    gathered ahead as there is room for, one at least: it costs no more than none.

    Args:
        free: Bytes that are free once the shares are loaded.
        root: Bytes of what is in no block.
        blocks: Bytes of each block.
        deepest: The most blocks to gather ahead.
        spare: Share of what is free that is left to activations.
    """
    room = int(free * (1 - spare))
    if root + sum(blocks) + max(blocks, default=0) <= room:
        return GatherPolicy(keep="all")
    for prefetch in range(deepest, 1, -1):
        if peak_bytes(root, blocks, prefetch) <= room:
            return GatherPolicy(prefetch=prefetch)
    return GatherPolicy()
