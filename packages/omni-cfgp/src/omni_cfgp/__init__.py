"""Guidance branches of diffusion models computed on different ranks."""

from omni_cfgp.__about__ import __version__ as __version__

__all__ = ["__version__"]
