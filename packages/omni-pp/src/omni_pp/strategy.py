"""Stages over ranks as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.strategy_options import config_with
from omni_pp.pipefusion import PipeFusionConfig, apply_pipefusion
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.application import apply_pipeline_parallel


class PipelineParallelStrategy:
    """Cuts the denoisers of a pipeline into stages over the ``pp`` group of a state."""

    name = "pp"

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Cut the denoisers of a pipeline, or one; options: of `PipelineParallelConfig`.

        Raises:
            ParallelConfigError: The target has no denoiser that can be cut so, or an option is
                none.
        """
        config = config_with(PipelineParallelConfig, options)
        return apply_pipeline_parallel(target, config, state=state)


class PipeFusionStrategy:
    """Cuts the denoisers of a pipeline into stages, and their calls into patches."""

    name = "pipefusion"

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Cut the denoisers of a pipeline; options: of `PipeFusionConfig`.

        Raises:
            ParallelConfigError: A denoiser or the scheduler cannot be used so, or an option is
                none.
        """
        return apply_pipefusion(target, config_with(PipeFusionConfig, options), state=state)


strategy = PipelineParallelStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: pp`` names."""

pipefusion_strategy = PipeFusionStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: pipefusion`` names."""
