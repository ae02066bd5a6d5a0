"""The contestants of sharded weights: whole on every rank, torch's defaults, and each policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from bench.contestants import Named
from bench.hsdp_results import AHEAD, ONCE, OWN, PLAIN
from omni_parallel_state import ParallelLayout, ParallelState

WHOLE: Final = "whole model"
POLICIES: Final[dict[str, dict[str, Any]]] = {
    "prefetch-0": {"prefetch": 0},
    AHEAD: {"prefetch": 1},
    "prefetch-2": {"prefetch": 2},
    "keep-last": {"keep": "last"},
    "keep-all": {"keep": "all"},
    "offload": {"cpu_offload": True},
    ONCE: {},
}
"""Policies of omni-hsdp; the last one is for a whole request."""


@dataclass(frozen=True)
class ShardingContestant(Named):
    """One way for ranks to have a model.

    Attributes:
        side: Whose it is.
        mode: What ``--modes`` calls it.
    """

    side: str
    mode: str

    @contextmanager
    def loaded(self, cls: Any, folder: str, ranks: int) -> Iterator[nn.Module]:
        """The model from its checkpoint, in the way of this contestant."""
        if self.side != OWN:
            yield load_whole(cls, folder, shard=self.side == PLAIN)
            return
        from omni_hsdp import GatherPolicy, HSDPInferenceConfig, load_hsdp_model

        config = HSDPInferenceConfig(enabled=True, param_dtype=None)
        state = ParallelState(ParallelLayout(fs=ranks), "cpu")
        try:
            policy = GatherPolicy(**POLICIES[self.mode])
            yield load_hsdp_model(cls, folder, config, state=state, policy=policy)
        finally:
            state.destroy()

    @contextmanager
    def requested(self, model: nn.Module) -> Iterator[None]:
        """Around the forwards of a request."""
        if (self.side, self.mode) != (OWN, ONCE):
            yield
            return
        from omni_hsdp import gathered

        with gathered(model):
            yield


def load_whole(cls: Any, folder: str, *, shard: bool = False) -> nn.Module:
    """The model as diffusers loads it, in memory of its own; sharded afterwards if asked for."""
    model: nn.Module = cls.from_pretrained(folder).eval()
    if shard:
        _fully_shard(model)
        return model
    with torch.no_grad():
        for parameter in model.parameters():  # they lie in the file: kernels round otherwise there
            parameter.data = parameter.data.clone()
    return model


def _fully_shard(model: nn.Module) -> None:
    """As torch's tutorials do it: each block, then the rest, with every default."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from omni_hsdp import find_blocks

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for _, block in find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharding_contestants(ranks: int) -> list[ShardingContestant]:
    """Every contestant; one rank alone has no policies."""
    found = [ShardingContestant(WHOLE, "everywhere")]
    if ranks == 1:
        return [*found, ShardingContestant(OWN, AHEAD)]
    found.append(ShardingContestant(PLAIN, "defaults"))
    return found + [ShardingContestant(OWN, mode) for mode in POLICIES]
