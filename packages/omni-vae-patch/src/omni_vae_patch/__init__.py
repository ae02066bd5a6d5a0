"""VAE encoding and decoding split over ranks."""

from omni_vae_patch.__about__ import __version__ as __version__

__all__ = ["__version__"]
