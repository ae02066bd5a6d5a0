"""Cutting an unmodified transformer into the stages of a pipeline, at its lists of blocks."""

from omni_pp.partition.balance import cut_blocks, measure_block_costs
from omni_pp.partition.block_lists import BlockList, find_block_lists
from omni_pp.partition.chunk import Chunk
from omni_pp.partition.partition import partition_model
from omni_pp.partition.partitioned_model import PartitionedModel

__all__ = [
    "BlockList",
    "Chunk",
    "PartitionedModel",
    "cut_blocks",
    "find_block_lists",
    "measure_block_costs",
    "partition_model",
]
