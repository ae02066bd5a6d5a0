"""What a group of ranks can do: checked collectives, point-to-point, all-to-all, ring and halo."""

from omni_group_coordinator.__about__ import __version__
from omni_group_coordinator.comm import (
    RingComm,
    SeqAllToAll4D,
    SeqAllToAll5D,
    all_to_all_4D,
    all_to_all_5D,
    halo_exchange,
    ring_shift,
)
from omni_group_coordinator.errors import (
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    RankMismatchError,
)
from omni_group_coordinator.group_coordinator import (
    GroupCoordinator,
    PipelineGroupCoordinator,
    SequenceParallelGroupCoordinator,
)
from omni_group_coordinator.messages import TensorSpec
from omni_group_coordinator.pending_work import PendingWork, wait_all
from omni_group_coordinator.process_groups import DEFAULT_TIMEOUT, ProcessGroupPool, ProcessGroups
from omni_group_coordinator.traffic import Traffic, record_traffic
from omni_group_coordinator.utils import backend_for_device, get_local_device, split_sizes

__all__ = [
    "DEFAULT_TIMEOUT",
    "CommunicationError",
    "GroupCoordinator",
    "ParallelConfigError",
    "ParallelError",
    "PendingWork",
    "PipelineGroupCoordinator",
    "ProcessGroupPool",
    "ProcessGroups",
    "RankMismatchError",
    "RingComm",
    "SeqAllToAll4D",
    "SeqAllToAll5D",
    "SequenceParallelGroupCoordinator",
    "TensorSpec",
    "Traffic",
    "__version__",
    "all_to_all_4D",
    "all_to_all_5D",
    "backend_for_device",
    "get_local_device",
    "halo_exchange",
    "record_traffic",
    "ring_shift",
    "split_sizes",
    "wait_all",
]
