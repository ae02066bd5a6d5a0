"""The call of an autoencoder that is under way, as its modules see it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from omni_vae_patch.spatial.partition import Partition
from omni_vae_patch.spatial.shard import SpatialShard

_numbers = itertools.count()


class Region:
    """What the rules of one autoencoder share.

    Attributes:
        shard: Of the call that is under way; ``None``: feature maps are whole.
        idle: The rows of the others, on a rank without any, which goes through the call with as
            many as the first rank has and computes nothing, for the kind of what comes out.
    """

    def __init__(self) -> None:
        self._key = f"region {next(_numbers)}"
        self.shard: SpatialShard | None = None
        self.idle: Partition | None = None

    @contextmanager
    def of(self, shard: SpatialShard | None, idle: Partition | None = None) -> Iterator[None]:
        """Within the block, feature maps are sharded so."""
        outer = self.shard, self.idle
        self.shard, self.idle = shard, idle
        if shard is not None:
            shard.run_as(self._key)
        try:
            yield
        finally:
            self.shard, self.idle = outer
