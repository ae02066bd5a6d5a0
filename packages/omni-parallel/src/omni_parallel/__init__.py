"""Diffusion models on several GPUs: every strategy of omni-parallel behind one versioned API."""

from omni_parallel.__about__ import __version__

__all__ = ["__version__"]
