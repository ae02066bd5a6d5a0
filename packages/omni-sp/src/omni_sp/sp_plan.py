"""The configuration, the entries of plans, and what checks and finds them, in one place."""

from omni_sp.plan_checks import validate_sp_plan
from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelConcatInput,
    SequenceParallelConvolution,
    SequenceParallelCount,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)
from omni_sp.plan_source import get_sp_plan_from_model
from omni_sp.sp_config import SequenceParallelConfig

__all__ = [
    "LOCAL_ATTENTION",
    "SequenceParallelAttention",
    "SequenceParallelConcatInput",
    "SequenceParallelConfig",
    "SequenceParallelConvolution",
    "SequenceParallelCount",
    "SequenceParallelInput",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "SequenceParallelPartialInput",
    "get_sp_plan_from_model",
    "validate_sp_plan",
]
