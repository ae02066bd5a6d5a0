"""Whether an autoencoder is still made of the modules that the rules were put on."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from omni_group_coordinator import ParallelError


class Unchanged:
    """Remembers the modules of an autoencoder, and their attention processors.

    Args:
        vae: The autoencoder, rules applied.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._parts = [
            (name, ref(module), getattr(module, "processor", None))
            for name, module in vae.named_modules()
        ]

    def check(self, vae: nn.Module) -> None:
        """Check an autoencoder before a call.

        Raises:
            ParallelError: A module or a processor was replaced or is new, so that it would see a
                part of the whole; or a batch norm takes statistics, which would be of a part.
        """
        here = {id(module): name for name, module in vae.named_modules()}
        known = set()
        for name, weak, processor in self._parts:
            module: Any = weak()
            known.add(id(module))
            if id(module) not in here or getattr(module, "processor", None) is not processor:
                self._refuse(name)
        for name, module in vae.named_modules():
            if id(module) not in known and not hasattr(module, "_orig_mod"):  # compiled since
                self._refuse(name)
            if isinstance(module, _BatchNorm) and module.training:
                msg = (
                    f"module {name!r} takes statistics of its batch, of which a rank has a part; "
                    "call vae.eval()"
                )
                raise ParallelError(msg)

    def _refuse(self, name: str) -> None:
        msg = (
            f"module {name!r} or its processor was replaced or added after parallelize_vae, so it "
            "would see this rank's rows alone; remove the handle, change it, apply again"
        )
        raise ParallelError(msg)
