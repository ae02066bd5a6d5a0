"""The names of `omni_group_coordinator.comm`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_group_coordinator.comm", "omni-group-coordinator")
