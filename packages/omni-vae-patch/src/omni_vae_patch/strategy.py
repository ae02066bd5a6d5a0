"""VAE parallelism as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_parallel_state import Handle, ParallelState
from omni_vae_patch.parallelize import parallelize_vae


class VaePatchStrategy:
    """Divides an autoencoder over the ``vae`` group of a state."""

    name = "vae_patch"

    def apply(self, target: Any, state: ParallelState) -> Handle:
        """Divide the work of an autoencoder, or of the one in a pipeline.

        Raises:
            ParallelConfigError: The target has no autoencoder.
        """
        return parallelize_vae(target, state=state)


strategy = VaePatchStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: vae_patch`` names."""
