"""Noise that a module adds to its feature maps: each rank takes its part of the whole."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.rebinding import subclass_with
from omni_vae_patch.spatial.region import Region

Undo = Callable[[], None]


def shard_noise(name: str, module: nn.Module, region: Region) -> Undo:
    """Have a module that calls ``torch.randn`` for a map of ``(height, width)`` draw the whole.

    The ranks draw the same if their random states are the same, as on one rank.

    Raises:
        ParallelConfigError: The module does not call ``torch.randn``.
    """

    def randn(*shape: Any, **options: Any) -> Tensor:
        shard, idle = region.shard, region.idle
        sides = list(shape[0] if len(shape) == 1 else shape)
        if idle is not None:  # as much as the others, so that its random state stays as theirs
            local = sides[idle.dim]
            sides[idle.dim] = local // idle.rows[0] * idle.total
            # Where this call computes nothing is thread-local, and random states are not.
            with ThreadPoolExecutor(1) as elsewhere:
                whole = elsewhere.submit(lambda: torch.randn(sides, **options)).result()
            return torch.empty_like(whole.narrow(idle.dim, 0, local))
        if shard is None:
            return torch.randn(*shape, **options)
        local = sides[shard.dim]
        lengths = shard.lengths(local, f"module {name!r}")
        sides[shard.dim] = sum(lengths)
        whole = torch.randn(sides, **options)
        return whole.narrow(shard.dim, sum(lengths[: shard.rank]), local)

    cls = type(module)
    subclass = subclass_with(cls, lambda value: randn if value is torch.randn else value)
    if subclass is None:
        msg = f"module {name!r}, a {cls.__name__}, does not call torch.randn"
        raise ParallelConfigError(msg)
    module.__class__ = subclass
    return lambda: setattr(module, "__class__", cls)
