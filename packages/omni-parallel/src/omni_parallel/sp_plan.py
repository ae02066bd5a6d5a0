"""The names of `omni_sp.sp_plan`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_sp.sp_plan", "omni-sp")
