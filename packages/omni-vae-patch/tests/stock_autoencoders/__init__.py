"""Small, unmodified autoencoders of diffusers with random weights."""

from __future__ import annotations

from . import images, videos, videos_cached, videos_hunyuan, videos_ltx
from .autoencoder_case import AutoencoderCase, decoded, encoded

CASES: dict[str, AutoencoderCase] = {
    name: case
    for module in (images, videos_cached, videos_hunyuan, videos_ltx, videos)
    for name, case in module.CASES.items()
}

__all__ = ["CASES", "AutoencoderCase", "decoded", "encoded"]
