"""The names of `omni_pp.pipeline_parallel`."""

from omni_parallel._forwarding import forward

__getattr__, __dir__ = forward("omni_pp.pipeline_parallel", "omni-pp")
