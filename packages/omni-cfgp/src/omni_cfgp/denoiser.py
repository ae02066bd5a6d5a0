"""One denoiser of an application: its name, and its calls as they are without us."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn

from omni_group_coordinator import ParallelError


@dataclass(frozen=True)
class Denoiser:
    """A module that predicts noise.

    Attributes:
        name: For messages; the same on every rank.
        call: Calls it, with its hooks and without guidance over ranks.
    """

    name: str
    _module: ref[nn.Module]
    call: Callable[..., Any]

    @property
    def module(self) -> nn.Module:
        """The module, which is alive while it is called."""
        module = self._module()
        if module is None:
            msg = f"{self.name} is no longer there"
            raise ParallelError(msg)
        return module

    @property
    def is_sharded(self) -> bool:
        """Whether its weights are sharded, so that ranks must call it as often as each other."""
        # Whoever sharded it imported this, which takes most of a second; elsewhere nobody waits.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is not None and isinstance(self.module, fsdp.FSDPModule)

    def parameter(self, index: int) -> str:
        """Name of a positional parameter."""
        module = getattr(self.module, "_orig_mod", self.module)  # what torch.compile wraps
        names = list(inspect.signature(module.forward).parameters)
        return names[index] if index < len(names) else ""

    def attention(self) -> tuple[str, ...]:
        """The classes of its attention processors: some know how the batch is made up."""
        found = {
            type(processor).__qualname__
            for module in self.module.modules()
            if (processor := getattr(module, "processor", None)) is not None
        }
        return tuple(sorted(found))

    @property
    def remembers(self) -> bool:
        """Whether calls depend on earlier ones: diffusers' caches of features, by its hooks."""
        return any(
            getattr(hook, "_is_stateful", False)
            for module in self.module.modules()
            if (registry := getattr(module, "_diffusers_hook", None)) is not None
            for hook in registry.hooks.values()
        )
