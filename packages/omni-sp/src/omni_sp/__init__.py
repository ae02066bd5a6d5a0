"""Sequence parallelism for diffusion transformers.

`apply_sequence_parallel` is the main entry; `sequence_parallel_attention`, `sp_shard` and
`sp_gather` serve code of your own.
"""

from omni_parallel_state import Handle
from omni_sp.__about__ import __version__
from omni_sp.attention import Degrees, attention_volume, sequence_parallel_attention
from omni_sp.hooks import apply_sequence_parallel, remove_sequence_parallel
from omni_sp.kernels import AttentionKernel, TorchKernel
from omni_sp.sharding_validator import ShardingValidator, get_sharding_validator
from omni_sp.shards import Segment, SequenceShards
from omni_sp.sp_plan import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelConcatInput,
    SequenceParallelConfig,
    SequenceParallelConvolution,
    SequenceParallelCount,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from omni_sp.sp_sharding import sp_gather, sp_shard, sp_shard_with_padding
from omni_sp.strategy import strategy

__all__ = [
    "LOCAL_ATTENTION",
    "AttentionKernel",
    "Degrees",
    "Handle",
    "Segment",
    "SequenceParallelAttention",
    "SequenceParallelConcatInput",
    "SequenceParallelConfig",
    "SequenceParallelConvolution",
    "SequenceParallelCount",
    "SequenceParallelInput",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "SequenceShards",
    "ShardingValidator",
    "TorchKernel",
    "__version__",
    "apply_sequence_parallel",
    "attention_volume",
    "get_sharding_validator",
    "get_sp_plan_from_model",
    "remove_sequence_parallel",
    "sequence_parallel_attention",
    "sp_gather",
    "sp_shard",
    "sp_shard_with_padding",
    "strategy",
    "validate_sp_plan",
]
