"""What a layout promises where its results are compared with those of one process."""

from __future__ import annotations

from dataclasses import replace

from omni_parallel.v1 import ParallelConfig


def is_exact(config: ParallelConfig) -> bool:
    """Whether a layout promises the results of one process, up to rounding."""
    tiled = config.vae_patch > 1 and config.vae_mode == "tile"
    return config.pipefusion == 1 and not tiled


def not_refused(config: ParallelConfig) -> ParallelConfig:
    """The same layout, whose settings are not refused because they stray far.

    The difference is measured where this is called. As many patches as there are stages keep all
    of these busy. Options that are given stand.
    """
    if config.pipefusion == 1 or "pipefusion" in config.options:
        return config
    options = {"patches": config.pipefusion, "force": True}
    return replace(config, options={**config.options, "pipefusion": options})
