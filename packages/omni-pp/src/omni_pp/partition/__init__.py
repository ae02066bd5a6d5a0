"""Cutting an unmodified transformer into the stages of a pipeline, at its lists of blocks."""

from omni_pp.partition.balance import cut_blocks, measure_block_costs
from omni_pp.partition.block_lists import BlockList, find_block_lists
from omni_pp.partition.chunk import Chunk
from omni_pp.partition.loading import load_stage
from omni_pp.partition.partition import (
    Balance,
    distributed_weight,
    partition_model,
    partition_of,
    refuse_other_cut,
)
from omni_pp.partition.partitioned_model import PartitionedModel

__all__ = [
    "Balance",
    "BlockList",
    "Chunk",
    "PartitionedModel",
    "cut_blocks",
    "distributed_weight",
    "find_block_lists",
    "load_stage",
    "measure_block_costs",
    "partition_model",
    "partition_of",
    "refuse_other_cut",
]
