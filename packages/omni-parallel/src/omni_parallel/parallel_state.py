"""The names of `omni_parallel_state.parallel_state`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_parallel_state.parallel_state", "omni-parallel-state")
