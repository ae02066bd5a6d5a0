"""Guidance over ranks as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.hooks import apply_cfg_parallel
from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.strategy_options import config_with


class CFGParallelStrategy:
    """Divides the guidance branches over the ``cfg`` group of a state."""

    name = "cfgp"

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Divide the guidance of a pipeline, or of a denoiser; options: of `CFGParallelConfig`.

        Raises:
            ParallelConfigError: The target has no denoiser that is known, or an option is none.
        """
        return apply_cfg_parallel(target, config_with(CFGParallelConfig, options), state=state)


strategy = CFGParallelStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: cfgp`` names."""
