"""Weights of diffusion models sharded over ranks."""

from omni_hsdp.__about__ import __version__ as __version__

__all__ = ["__version__"]
