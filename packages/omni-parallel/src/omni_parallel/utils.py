"""The names of `omni_group_coordinator.utils`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_group_coordinator.utils", "omni-group-coordinator")
