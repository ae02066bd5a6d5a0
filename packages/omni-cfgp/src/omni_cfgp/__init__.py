"""Guidance branches of diffusion models computed on different ranks."""

from omni_cfgp.__about__ import __version__
from omni_cfgp.branches import assign_branches
from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.cfg_parallel import CFGParallelMixin
from omni_cfgp.guidance import guided, guided_by_stages, rescaled
from omni_cfgp.hooks import apply_cfg_parallel
from omni_cfgp.strategy import CFGParallelStrategy, strategy
from omni_parallel_state.denoising.names import DENOISERS

__all__ = [
    "DENOISERS",
    "CFGParallelConfig",
    "CFGParallelMixin",
    "CFGParallelStrategy",
    "__version__",
    "apply_cfg_parallel",
    "assign_branches",
    "guided",
    "guided_by_stages",
    "rescaled",
    "strategy",
]
