"""Pipeline parallelism for diffusion transformers."""

from omni_pp.__about__ import __version__ as __version__

__all__ = ["__version__"]
