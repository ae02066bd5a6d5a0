"""Guidance over ranks as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_cfgp.hooks import apply_cfg_parallel
from omni_parallel_state import Handle, ParallelState


class CFGParallelStrategy:
    """Divides the guidance branches over the ``cfg`` group of a state."""

    name = "cfgp"

    def apply(self, target: Any, state: ParallelState) -> Handle:
        """Divide the guidance of a pipeline, or of a denoiser.

        Raises:
            ParallelConfigError: The target has no denoiser that is known.
        """
        return apply_cfg_parallel(target, state=state)


strategy = CFGParallelStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: cfgp`` names."""
