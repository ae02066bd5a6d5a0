"""Sequence parallelism for diffusion transformers.

`apply_sequence_parallel` is the main entry; `sp_shard` and `sp_gather` serve code of your own.
"""

from omni_sp.__about__ import __version__
from omni_sp.attention import ulysses_attention
from omni_sp.handle import Handle
from omni_sp.hooks import apply_sequence_parallel, remove_sequence_parallel
from omni_sp.sp_plan import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from omni_sp.sp_sharding import sp_gather, sp_shard
from omni_sp.strategy import strategy

__all__ = [
    "Handle",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "__version__",
    "apply_sequence_parallel",
    "get_sp_plan_from_model",
    "remove_sequence_parallel",
    "sp_gather",
    "sp_shard",
    "strategy",
    "ulysses_attention",
    "validate_sp_plan",
]
