"""One model that was made sequence-parallel, and the call of it that is under way."""

from __future__ import annotations

from omni_group_coordinator import SequenceParallelGroupCoordinator
from omni_sp.region import ShardedRegion
from omni_sp.shards import Order


class Application:
    """What the hooks of one model share.

    Args:
        group: The ranks.
        order: How tokens are dealt out.
        masks: Names of split inputs that are key masks.

    Attributes:
        region: Of the call of the model that is under way; ``None`` between calls.
    """

    def __init__(
        self, group: SequenceParallelGroupCoordinator, order: Order, masks: frozenset[str]
    ) -> None:
        self.group = group
        self.order = order
        self.masks = masks
        self.region: ShardedRegion | None = None

    def new_region(self) -> ShardedRegion:
        """A region for a call that begins."""
        return ShardedRegion(self.group, self.order, self.masks)
