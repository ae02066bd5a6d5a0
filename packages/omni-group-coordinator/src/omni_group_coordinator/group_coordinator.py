"""The coordinators, in one module."""

from omni_group_coordinator.coordinator import GroupCoordinator, checked_group_of
from omni_group_coordinator.pipeline_group import PipelineGroupCoordinator
from omni_group_coordinator.sequence_parallel_group import SequenceParallelGroupCoordinator

__all__ = [
    "GroupCoordinator",
    "PipelineGroupCoordinator",
    "SequenceParallelGroupCoordinator",
    "checked_group_of",
]
