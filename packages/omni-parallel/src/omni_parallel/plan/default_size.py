"""How large pipelines make an image or video that no size was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PIXELS = 1024
"""Of a side, where neither the request nor the pipeline says it."""
_POSITIONS = 128
"""Latent positions of a side in pipelines whose denoiser's configuration has no size."""


@dataclass(frozen=True)
class DefaultSize:
    """Pixels of the sides, and frames."""

    width: int
    height: int
    frames: int


def default_size(
    defaults: Mapping[str, Any], config: Mapping[str, Any], spatial: int
) -> DefaultSize:
    """What a pipeline makes where its call is not told.

    Args:
        defaults: Arguments of the pipeline's call that have a default, which may be None: then it
            is the size that the denoiser was trained for.
        config: Of the denoiser.
        spatial: Pixels of one side of a latent position.
    """
    trained = config.get("sample_size")
    pair = trained if isinstance(trained, list | tuple) else (trained, trained)

    def side(name: str, index: int) -> int:
        given = defaults.get(name)
        if isinstance(given, int):
            return given
        positions = config.get(f"sample_{name}") or pair[index]
        if isinstance(positions, int):
            return positions * spatial
        return _POSITIONS * spatial if name in defaults else PIXELS

    frames = defaults.get("num_frames")
    if not isinstance(frames, int):
        frames = config.get("sample_frames") if "num_frames" in defaults else None
    return DefaultSize(side("width", 1), side("height", 0), frames or 1)
