"""What each rank will do, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_group_coordinator import ParallelConfigError
from omni_parallel.v1.parallel_config import ParallelConfig
from omni_parallel.v1.problems import of_pairs

_SHOWN = 16


def explain(
    config: ParallelConfig | str | Path | Mapping[str, Any], world_size: int | None = None
) -> str:
    """What each rank does under a configuration, one line each.

    Args:
        config: What ranks share: a configuration, or another form of one, as of `parallelize`.
        world_size: Ranks that there are; default: as many as it needs.

    Raises:
        ParallelConfigError: It is none, strategies do not go together, or the degrees do not fit
            so many ranks.
    """
    config = ParallelConfig.of(config)
    if problems := "; ".join(of_pairs(config)):
        raise ParallelConfigError(problems)
    world_size = config.ranks if world_size is None else world_size
    layout = config.layout(world_size)
    lines = [f"{config} on {world_size} rank{'' if world_size == 1 else 's'}"]
    for rank in range(min(world_size, _SHOWN)):
        at = layout.coordinates(rank)
        parts = [
            said
            for said in (
                _part("replica", at["dp"], layout.dp if _has_replicas(config) else 1),
                _part("guidance branches, share", at["cfg"], layout.cfg),
                _part("stage", at["pp"], layout.pp),
                _part("tokens, share", at["sp"], layout.sp),
                _part("weights, share", at["fs"], layout.fs),
                _part("autoencoder, share", at["vae"], layout.vae),
            )
            if said
        ]
        lines.append(f"  rank {rank}: {'; '.join(parts) or 'everything'}")
    if world_size > _SHOWN:
        lines.append(f"  … and so on to rank {world_size - 1}")
    if config.pipefusion > 1:
        lines.append("  pipefusion approximates: keys and values are those of the step before")
    if config.vae_patch > 1 and config.vae_mode == "tile":
        lines.append("  vae_mode=tile approximates: tiles do not see beyond their borders")
    return "\n".join(lines)


def _has_replicas(config: ParallelConfig) -> bool:
    """Whether dp is more than what overlays lie over."""
    shared = config.cfg * config.ulysses * config.ring * config.pp * config.pipefusion
    return config.dp is not None or shared > 1 or not (config.hsdp > 1 or config.vae_patch > 1)


def _part(what: str, index: int, count: int) -> str:
    return f"{what} {index + 1} of {count}" if count > 1 else ""
