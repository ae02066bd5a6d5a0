"""A model's ``forward``, run inside a sharded region."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from omni_sp.agreement import until_all_are_through
from omni_sp.application import Application
from omni_sp.planned_module import PlannedModule
from omni_sp.region import ShardedRegion
from omni_sp.unknown_attention import UnknownAttention, has_compiled_parts


class RegionForward:
    """Stands in the place of ``module.forward``, on this one instance.

    Not a pair of hooks: a region must end whatever leaves the call, and torch runs no hook for a
    `KeyboardInterrupt`.

    Args:
        module: The model.
        planned: What the plan says of the model's own inputs and outputs, if anything.
        application: Shared with the hooks inside the model.

    Attributes:
        enabled: Whether calls are split; else this is a mere passage.
    """

    def __init__(
        self, module: nn.Module, planned: PlannedModule | None, application: Application
    ) -> None:
        self._module = module
        self._planned = planned
        self._application = application
        self._own: Callable[..., Any] | None = module.__dict__.get("forward")
        self._original: Callable[..., Any] = module.forward
        self.enabled = True
        self._is_copy = False
        # Not its attributes: they may be those of an older object of this class.
        functools.update_wrapper(self, self._original, updated=())
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its sequence split over the ranks."""
        if not self.enabled:
            return self._original(*args, **kwargs)
        if not (torch.compiler.is_compiling() or self._is_copy):
            self._application.check()
        outer = self._application.region
        region = self._application.region = self._application.new_region()
        self._application.legal_calls = 0
        try:
            if self._planned is not None and self._planned.has_inputs:
                args, kwargs = self._planned.split_inputs(args, kwargs)
            output = self._watched(region, args, kwargs)
            if self._planned is not None and self._planned.has_outputs:
                output = self._planned.change_outputs(args, kwargs, output)
            region.close()
            self._application.verified |= region.watched
            return output
        finally:
            self._application.region = outer

    def _watched(self, region: ShardedRegion, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original, in its first call watched for attention that does not fit."""
        if (
            self._application.verified
            or torch.compiler.is_compiling()
            or has_compiled_parts(self._module)
        ):
            return self._original(*args, **kwargs)
        region.watched = True
        together = until_all_are_through(self._application.group, lambda: region.refused)
        with together, UnknownAttention(self._application):
            return self._original(*args, **kwargs)

    def give_back(self) -> None:
        """Put the original ``forward`` back."""
        if self._module.__dict__.get("forward") is not self:
            self.enabled = False  # somebody wrapped it since: stay, as a mere passage
        elif self._own is not None:
            self._module.__dict__["forward"] = self._own
        else:
            del self._module.__dict__["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionForward:
        """A copied model must run its own weights: bind to the copy, not to the original."""
        twin = object.__new__(RegionForward)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin._is_copy = True  # of its modules nothing was noted
        twin._module = memo.get(id(self._module), self._module)
        if isinstance(self._original, MethodType):
            twin._original = MethodType(self._original.__func__, twin._module)
        else:
            twin._original = copy.deepcopy(self._original, memo)
        twin.__dict__["__wrapped__"] = twin._original
        return twin
