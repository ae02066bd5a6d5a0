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
        self._places: dict[str, tuple[ref[nn.Module], str, ref[nn.Module]]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Application:
        """A copied model shares it, since the attention that was taken over does."""
        return self

    def watch(self, module: nn.Module, name: str, processor: object) -> None:
        """Take note of a processor that was put in a module, for `check`."""
        self._watched.append((ref(module), name, processor))

    def watch_place(self, model: nn.Module, name: str) -> None:
        """Take note of a module, and of those that hold it, in their places, for `check`."""
        path, parent = "", model
        for key in name.split(".") if name else ():
            path, child = f"{path}.{key}" if path else key, parent.get_submodule(key)
            self._places[path] = (ref(parent), key, ref(child))
            parent = child

    def check(self) -> None:
        """Check that nobody has replaced a module or a processor since.

        Raises:
            ParallelError: Somebody has: its attention would see this rank's tokens alone.
        """
        for path, (weak_parent, key, weak_child) in self._places.items():
            parent, child = weak_parent(), weak_child()
            if parent is not None and not _holds(parent._modules.get(key), child):
                msg = (
                    f"module {path!r} was replaced after apply_sequence_parallel, so the new one "
                    "would see this rank's tokens alone; remove the handle, change modules, apply "
                    "again"
                )
                raise ParallelError(msg)
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


def _holds(found: nn.Module | None, child: nn.Module | None) -> bool:
    """Whether a module is another, or wraps it: as one that torch.compile returned."""
    if found is None or child is None:
        return False
    return found is child or any(part is child for part in found.modules())
