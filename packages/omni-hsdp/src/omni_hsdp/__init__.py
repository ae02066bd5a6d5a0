"""Weights of diffusion models sharded over ranks."""

from omni_hsdp.__about__ import __version__
from omni_hsdp.conditions import find_blocks
from omni_hsdp.gather_policy import GatherPolicy
from omni_hsdp.gathering import choose_policy, gathered, release, set_policy
from omni_hsdp.hsdp import apply_hsdp_to_model, handle_of, remove_hsdp
from omni_hsdp.hsdp_config import HSDPInferenceConfig
from omni_hsdp.hsdp_utils import is_transformer_block_module
from omni_hsdp.ignored import WholeParameter
from omni_hsdp.loading import load_hsdp_model
from omni_hsdp.report import HSDPReport, hsdp_report
from omni_hsdp.strategy import HSDPStrategy, strategy
from omni_hsdp.whole_shapes import whole_shapes
from omni_parallel_state.denoising.names import DENOISERS

__all__ = [
    "DENOISERS",
    "GatherPolicy",
    "HSDPInferenceConfig",
    "HSDPReport",
    "HSDPStrategy",
    "WholeParameter",
    "__version__",
    "apply_hsdp_to_model",
    "choose_policy",
    "find_blocks",
    "gathered",
    "handle_of",
    "hsdp_report",
    "is_transformer_block_module",
    "load_hsdp_model",
    "release",
    "remove_hsdp",
    "set_policy",
    "strategy",
    "whole_shapes",
]
