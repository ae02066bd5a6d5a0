"""VAE parallelism as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.strategy_options import config_with
from omni_vae_patch.parallelize import parallelize_vae
from omni_vae_patch.vae_config import VaeParallelConfig


class VaePatchStrategy:
    """Divides an autoencoder over the ``vae`` group of a state."""

    name = "vae_patch"

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Divide an autoencoder, or the one in a pipeline; options: of `VaeParallelConfig`.

        Raises:
            ParallelConfigError: The target has no autoencoder, or an option is none.
        """
        return parallelize_vae(target, config_with(VaeParallelConfig, options), state=state)


strategy = VaePatchStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: vae_patch`` names."""
