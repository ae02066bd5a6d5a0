"""One model that was made sequence-parallel, and the call of it that is under way."""

from __future__ import annotations

from weakref import ref

from torch import nn

from omni_group_coordinator import ParallelError, SequenceParallelGroupCoordinator
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
        legal_calls: How many attention calls are under way that are known: parallel or local ones.
        verified: Whether a whole call of the model was watched for unknown ones.
    """

    def __init__(
        self, group: SequenceParallelGroupCoordinator, order: Order, masks: frozenset[str]
    ) -> None:
        self.group = group
        self.order = order
        self.masks = masks
        self.region: ShardedRegion | None = None
        self.legal_calls = 0
        self.verified = False
        self._watched: list[tuple[ref[nn.Module], str, object]] = []

    def watch(self, module: nn.Module, name: str, processor: object) -> None:
        """Take note of a processor that was put in a module, for `check`."""
        self._watched.append((ref(module), name, processor))

    def check(self) -> None:
        """Check that nobody has put another processor in a module since.

        Raises:
            ParallelError: Somebody has: its attention would see this rank's tokens alone.
        """
        for weak, name, processor in self._watched:
            module = weak()
            if module is not None and module.processor is not processor:
                msg = (
                    f"the attention processor of module {name!r} was replaced after "
                    "apply_sequence_parallel; remove the handle, change processors, apply again"
                )
                raise ParallelError(msg)

    def new_region(self) -> ShardedRegion:
        """A region for a call that begins."""
        return ShardedRegion(self.group, self.order, self.masks)
