"""How the denoisers of a pipeline are cut, or were when they were loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict

from torch import nn

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_pp.partition import (
    Balance,
    PartitionedModel,
    partition_model,
    partition_of,
    refuse_other_cut,
)
from omni_pp.pp_config import PipelineParallelConfig


def cut(
    module: nn.Module, group: GroupCoordinator, config: PipelineParallelConfig
) -> PartitionedModel:
    """Cut a denoiser into the stages of a group."""
    return partition_model(
        module,
        group.world_size,
        stage=group.rank_in_group,
        **_where(config),
        release=config.release,
    )


class _Where(TypedDict):
    virtual_stages: int
    points: tuple[int, ...] | None
    balance: Balance
    block_lists: tuple[str, ...]


def _where(config: PipelineParallelConfig) -> _Where:
    return {
        "virtual_stages": config.virtual_stages,
        "points": config.points or None,
        "balance": config.balance,
        "block_lists": config.block_lists,
    }


def as_cut(
    denoisers: Mapping[str, nn.Module], group: GroupCoordinator, config: PipelineParallelConfig
) -> PipelineParallelConfig:
    """The configuration, with as many chunks as denoisers have that are cut already.

    Raises:
        ParallelConfigError: One is cut in another way.
    """
    chunks = config.virtual_stages
    for name, module in denoisers.items():
        part = partition_of(module)
        if part is None:
            continue
        if (part.stages, part.stage) != (group.world_size, group.rank_in_group):
            msg = (
                f"{name} was cut into {part.stages} stages, of which this rank has stage "
                f"{part.stage}, and is applied on stage {group.rank_in_group} of "
                f"{group.world_size}; load it with the state that it is applied with"
            )
            raise ParallelConfigError(msg)
        refuse_other_cut(part, **_where(config))
        chunks = max(chunks, part.virtual)
    return replace(config, virtual_stages=chunks)


def check_caches(name: str, module: nn.Module) -> None:
    """Refuse caches of features, which decide from their input which blocks to leave out."""
    for where, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(hook, "_is_stateful", False):
                msg = (
                    f"{name} caches features ({type(hook).__name__} on {where or 'the model'}): "
                    "stages would decide apart which blocks to leave out; call disable_cache() "
                    "first"
                )
                raise ParallelConfigError(msg)
