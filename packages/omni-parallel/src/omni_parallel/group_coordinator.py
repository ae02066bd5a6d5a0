"""The names of `omni_group_coordinator.group_coordinator`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_group_coordinator.group_coordinator", "omni-group-coordinator")
