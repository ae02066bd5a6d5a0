"""Accelerators on hosts, and how long they take for what: arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omni_parallel.plan.gpu_types import GpuType

if TYPE_CHECKING:
    from omni_parallel_state import ParallelLayout  # torch comes with it


@dataclass(frozen=True)
class Machine:
    """Accelerators, and what of their peaks is reached."""

    gpu: GpuType
    ranks: int
    nodes: int = 1
    efficiency: float = 0.45
    """Share of the peak that a denoiser reaches. Measured on one H100 SXM, not compiled: Flux 0.35
    at 512 x 512 pixels, 0.42 at 1024 x 1024, 0.49 at 2048 x 2048; Wan 14B 0.50 to 0.54 at 480p."""
    decode_efficiency: float = 0.12
    """Share of the peak that an autoencoder reaches: 0.12 of Flux and 0.13 of Wan, likewise."""
    link_efficiency: float = 0.75
    """Share of the peak of links."""

    def compute_seconds(self, flops: float, weights: int, share: float | None = None) -> float:
        """Of one call: its operations, or reading its weights once, whichever takes longer.

        Args:
            flops: Multiplications and additions.
            weights: Bytes that it reads.
            share: Of the peak that is reached; default: that of denoisers.
        """
        reading = weights / (self.gpu.memory_gbps * 1e9)
        return max(flops / (self.gpu.tflops * 1e12 * (share or self.efficiency)), reading)

    def link_seconds(self, size: float, layout: ParallelLayout, dim: str) -> float:
        """Of bytes that each rank sends to the ranks of a group.

        Where one group spans hosts, all of its bytes count as sent between hosts.
        """
        if not size:
            return 0.0
        here = self.ranks // self.nodes
        crosses = any(len({rank // here for rank in group}) > 1 for group in layout.groups(dim))
        speed = self.gpu.node_link_gbps if crosses else self.gpu.link_gbps
        return size / (speed * 1e9 * self.link_efficiency)
