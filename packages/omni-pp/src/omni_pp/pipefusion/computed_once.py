"""Modules that are given the same for every patch of a call, and computed for the first alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.pipefusion.patch_plan import CARRIED_TEXT
from omni_pp.pipefusion.patch_view import PatchView


class Once:
    """Has a module return for later patches of a call what it did for the first one.

    Args:
        module: The module.
        view_of: Gives the patch that is under way, if any.
    """

    def __init__(self, module: nn.Module, view_of: Callable[[], PatchView | None]) -> None:
        self._module, self._view_of = module, view_of
        self._key = str(id(module))
        self._had = module.__dict__.get("forward")
        self._below = module.forward
        module.forward = self._forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        view = self._view_of()
        if view is None or view.is_whole or not self._is_same(view):
            return self._below(*args, **kwargs)
        outputs = view.call.computed.setdefault((view.chunk, self._key), [])
        index = view.seen.get(self._key, 0)
        view.seen[self._key] = index + 1
        if index < len(outputs):
            return outputs[index]
        found = self._below(*args, **kwargs)
        outputs.append(self._kept(found))
        return found

    def _is_same(self, view: PatchView) -> bool:
        """Whether the module is given the same with every patch of the call."""
        return True

    def _kept(self, output: Any) -> Any:
        """What later patches get."""
        return output

    def undo(self) -> None:
        """Take it off."""
        if self._had is None:
            self._module.__dict__.pop("forward", None)
        else:
            self._module.forward = self._had


class OnceInAStep(Once):
    """As `Once`, of what a module makes of the timestep, which may be one for each token."""

    def _is_same(self, view: PatchView) -> bool:
        return "timestep" not in view.call.cut


class OnceForWords(Once):
    """As `Once`, of a module that is given text alone, little of which goes with later patches."""

    def _kept(self, output: Tensor) -> Tensor:
        return output.narrow(1, 0, min(CARRIED_TEXT, output.shape[1])).clone()


def modules_named(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The module of a name, or with ``.*`` after it those in the list or dict of that name.

    Raises:
        ParallelConfigError: There is none.
    """
    path = pattern.removesuffix(".*")
    try:
        found = model.get_submodule(path)
    except AttributeError:
        msg = f"{type(model).__name__} has no {path!r}, which PipeFusion looked for"
        raise ParallelConfigError(msg) from None
    return [found] if path == pattern else list(found.children())


def modules_at(model: nn.Module, pattern: str) -> list[nn.Module]:
    """As `modules_named`, also of a name within each module of a list; there may be none."""
    path, star, name = pattern.partition(".*")
    try:
        found = modules_named(model, path + star)
    except ParallelConfigError:
        return []
    parts = found if not name else [_within(module, name.removeprefix(".")) for module in found]
    return [module for module in parts if isinstance(module, nn.Module)]


def _within(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
