"""What stands in the place of a module's ``forward``, and knows the call that is under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from omni_vae_patch.spatial.region import Region


class ShardedForward:
    """Base of what is put in the place of ``module.forward``, on one instance.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        region: Knows the call that is under way.
    """

    def __init__(self, name: str, module: nn.Module, region: Region) -> None:
        self._where = f"module {name!r}, a {type(module).__name__},"
        self._module: Any = module
        self._region = region
        self._original: Callable[..., Tensor] = module.forward
