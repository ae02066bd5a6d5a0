"""Stages over ranks as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_parallel_state import Handle, ParallelState
from omni_pp.stages.application import apply_pipeline_parallel


class PipelineParallelStrategy:
    """Cuts the denoisers of a pipeline into stages over the ``pp`` group of a state."""

    name = "pp"

    def apply(self, target: Any, state: ParallelState) -> Handle:
        """Cut the denoisers of a pipeline, or one denoiser.

        Raises:
            ParallelConfigError: The target has no denoiser that can be cut so.
        """
        return apply_pipeline_parallel(target, state=state)


strategy = PipelineParallelStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: pp`` names."""
