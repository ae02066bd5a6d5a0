"""A model's ``forward``, run inside a sharded region."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from omni_group_coordinator import GroupCoordinator
from omni_sp._eager import outside_traces
from omni_sp.planned_module import PlannedModule
from omni_sp.region import ShardedRegion, current_region


class RegionForward:
    """Stands in the place of ``module.forward``, on this one instance.

    Not a pair of hooks: a region must end whatever leaves the call, and torch runs no hook for a
    `KeyboardInterrupt`.

    Args:
        module: The model.
        planned: What the plan says of the model's own inputs and outputs, if anything.
        group: The ranks.
    """

    def __init__(
        self, module: nn.Module, planned: PlannedModule | None, group: GroupCoordinator
    ) -> None:
        self._module = module
        self._planned = planned
        self._group = group
        self._own: Callable[..., Any] | None = module.__dict__.get("forward")
        self._original: Callable[..., Any] = module.forward
        self._enabled = True
        self._call_eagerly = outside_traces(RegionForward._call)
        functools.update_wrapper(self, self._original)
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its sequence split over the ranks."""
        return self._call_eagerly(self, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if not self._enabled:
            return self._original(*args, **kwargs)
        region = ShardedRegion(self._group)
        token = current_region.set(region)
        try:
            with region.attention:
                if self._planned is not None:
                    args, kwargs = self._planned.split_inputs(args, kwargs)
                output = self._original(*args, **kwargs)
                if self._planned is not None:
                    output = self._planned.change_outputs(output)
            region.close()
            return output
        finally:
            current_region.reset(token)

    def give_back(self) -> None:
        """Put the original ``forward`` back."""
        if self._module.__dict__.get("forward") is not self:
            self._enabled = False  # somebody wrapped it since: stay, as a mere passage
        elif self._own is not None:
            self._module.__dict__["forward"] = self._own
        else:
            del self._module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionForward:
        """A copied model must run its own weights: bind to the copy, not to the original."""
        twin = object.__new__(RegionForward)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin._module = memo.get(id(self._module), self._module)
        if isinstance(self._original, MethodType):
            twin._original = MethodType(self._original.__func__, twin._module)
        else:
            twin._original = copy.deepcopy(self._original, memo)
        twin.__dict__["__wrapped__"] = twin._original
        return twin
