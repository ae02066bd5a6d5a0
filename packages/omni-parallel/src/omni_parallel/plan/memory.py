"""Memory of a rank: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omni_parallel.plan.recorded_call import Block
from omni_parallel.plan.sent_bytes import cached_bytes
from omni_parallel.plan.workload import Workload
from omni_parallel.v1 import ParallelConfig

USABLE = 0.92
"""Share of a memory that a plan may fill: the rest is for the driver's context, the buffers of
collectives and libraries, and the allocator's gaps."""

_GATHERED = 2
"""Blocks that are whole at once, where weights are shared: one computes, the next one arrives."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of the rank that needs most."""

    weights: int
    """Of everything that stays."""
    caches: int
    """Keys and values that are kept between steps."""
    working: int
    """At most beside these: of a step with the weights that it gathers, or of decoding."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.caches + self.working


def memory_use(
    work: Workload, config: ParallelConfig, parts: Sequence[Sequence[Block]], mine: int
) -> MemoryUse:
    """What a rank of the heaviest stage holds.

    Args:
        work: What is to be done.
        config: The layout.
        parts: Blocks of each stage.
        mine: Branches of guidance that a rank computes.
    """
    outside = work.denoiser.outside.weights
    stage = max(sum(block.weights for block in part) for part in parts)
    held = -(-(stage + outside) // config.hsdp)
    largest = max((block.weights for block in work.denoiser.blocks), default=0)
    gathered = 0 if config.hsdp == 1 else min(_GATHERED * largest, stage) + outside
    rows = mine if work.batched and len(parts) == 1 else 1
    running = rows * work.denoiser.peak_bytes // (config.ulysses * config.ring)
    decoding = 0
    if work.decode is not None:
        whole = work.decode.output_bytes if config.vae_patch > 1 else 0
        decoding = work.decode.peak_bytes // config.vae_patch + whole
    kept = max(cached_bytes(part, work, mine) for part in parts) if config.pipefusion > 1 else 0
    return MemoryUse(
        work.denoisers * held + sum((work.weights or {}).values()),
        kept,
        max(running + gathered, decoding),
    )
