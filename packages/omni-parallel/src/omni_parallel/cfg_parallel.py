"""The names of `omni_cfgp.cfg_parallel`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_cfgp.cfg_parallel", "omni-cfgp")
