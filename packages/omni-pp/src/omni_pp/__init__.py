"""Stages of diffusion transformers over ranks, and what keeps them busy."""

from omni_pp.__about__ import __version__
from omni_pp.partition import PartitionedModel, load_stage, partition_model
from omni_pp.pipefusion import PipeFusionConfig, PipeFusionHandle, apply_pipefusion
from omni_pp.pipeline_parallel import AsyncLatents, PipelineParallelMixin
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.application import apply_pipeline_parallel
from omni_pp.stages.pipeline_handle import PipelineHandle
from omni_pp.strategy import PipelineParallelStrategy, strategy

__all__ = [
    "AsyncLatents",
    "PartitionedModel",
    "PipeFusionConfig",
    "PipeFusionHandle",
    "PipelineHandle",
    "PipelineParallelConfig",
    "PipelineParallelMixin",
    "PipelineParallelStrategy",
    "__version__",
    "apply_pipefusion",
    "apply_pipeline_parallel",
    "load_stage",
    "partition_model",
    "strategy",
]
