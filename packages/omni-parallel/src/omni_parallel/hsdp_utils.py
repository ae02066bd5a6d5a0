"""The names of `omni_hsdp.hsdp_utils`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_hsdp.hsdp_utils", "omni-hsdp")
