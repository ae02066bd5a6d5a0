"""How far PipeFusion strays from the exact result, and where that is too far."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError
from omni_pp.pipefusion.pipefusion_config import PipeFusionConfig


@dataclass(frozen=True)
class Difference:
    """How far one picture is from the exact one."""

    psnr: float
    """Peak signal-to-noise ratio in dB; infinite where they are equal."""
    largest: float
    """Largest difference of an element."""


def difference(found: Tensor, exact: Tensor, peak: float = 1.0) -> Difference:
    """Compare a picture with the exact one.

    Args:
        found: Elements of any shape.
        exact: Of the same shape.
        peak: The range of the elements.
    """
    error = found.double() - exact.double()
    mean = error.square().mean()
    psnr = 10 * torch.log10(peak**2 / mean) if mean > 0 else torch.tensor(float("inf"))
    return Difference(float(psnr), float(error.abs().max()))


MEASURED: dict[tuple[int, int], dict[int, float]] = {
    (2, 1): {4: 33.8, 6: 37.8, 8: 41.6, 10: 43.3, 20: 47.5, 50: 54.8},
    (2, 2): {4: 36.5, 6: 39.6, 8: 42.0, 10: 43.0, 20: 46.5, 50: 54.6},
    (2, 3): {4: 39.3, 6: 39.9, 8: 41.6, 10: 43.0, 20: 47.9, 50: 54.3},
    (2, 4): {6: 41.6, 8: 41.8, 10: 43.0, 20: 48.3, 50: 54.1},
    (4, 1): {4: 31.9, 6: 33.2, 8: 34.4, 10: 37.4, 20: 43.9, 50: 51.6},
    (4, 2): {4: 35.5, 6: 38.1, 8: 40.2, 10: 40.8, 20: 43.8, 50: 51.5},
    (4, 3): {4: 39.2, 6: 39.1, 8: 40.5, 10: 41.7, 20: 45.4, 50: 51.5},
    (4, 4): {6: 41.0, 8: 41.1, 10: 42.1, 20: 47.0, 50: 51.7},
    (8, 1): {4: 28.9, 6: 30.2, 8: 31.1, 10: 33.5, 20: 39.6, 50: 48.8},
    (8, 2): {4: 32.7, 6: 35.3, 8: 37.1, 10: 35.8, 20: 36.1, 50: 48.4},
    (8, 3): {4: 36.7, 6: 36.4, 8: 37.3, 10: 38.5, 20: 40.2, 50: 48.0},
    (8, 4): {6: 39.2, 8: 38.3, 10: 38.9, 20: 43.6, 50: 47.8},
}
"""By patches and exact steps, then by steps in all: PSNR in dB against the exact picture.

Of the picture that strays farthest of twelve, at 128 x 128 pixels (64 image tokens), guidance 3.0,
of the trained model that omni-parallel ships: see ``tools/pipefusion_report.py`` of the repository,
whose report this is. Another model may differ: compare its pictures by `difference`."""

GOOD_ENOUGH = 35.0
"""PSNR in dB below which settings are refused.

By looking at the report's pictures beside the exact ones: up to 32 dB shapes are bent, and up to 35
colours and edges are seen to be others; above that no difference was seen."""


def fewest_steps(config: PipeFusionConfig) -> int:
    """The fewest steps of a request from which on all measured ones are `GOOD_ENOUGH`.

    More patches than were measured count as the most, and more exact steps likewise.
    """
    patches = sorted({patches for patches, _ in MEASURED})
    most = next((one for one in patches if one >= config.patches), patches[-1])
    warmup = min(config.warmup_steps, max(steps for _, steps in MEASURED))
    row = MEASURED[most, warmup]
    bad = [steps for steps, psnr in row.items() if psnr < GOOD_ENOUGH]
    return min(steps for steps in row if steps > max(bad, default=0))


def check_steps(config: PipeFusionConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse a request of too few steps.

    Args:
        config: How calls are cut.
        arguments: Of the pipeline's call by name, with its defaults.

    Raises:
        ParallelConfigError: The result would stray too far.
    """
    steps = steps_of(arguments)
    if config.force or config.patches == 1 or steps is None or steps <= config.warmup_steps:
        return
    fewest = fewest_steps(config)
    if steps < fewest:
        msg = (
            f"{steps} steps, {config.warmup_steps} of them exact, with patches={config.patches} "
            f"give pictures that visibly stray from the exact ones (below {GOOD_ENOUGH:g} dB of "
            f"PSNR); legal: {fewest} steps and more, warmup_steps={steps} (all exact), or "
            "force=True"
        )
        raise ParallelConfigError(msg)


def steps_of(arguments: Mapping[str, Any]) -> int | None:
    """How many steps a request has; ``None`` if its arguments do not say.

    Args:
        arguments: Of the pipeline's call by name, with its defaults.
    """
    for name in ("timesteps", "sigmas"):
        if isinstance(given := arguments.get(name), Sized):  # also an array, or a tensor
            return len(given)
    steps = arguments.get("num_inference_steps")
    if not isinstance(steps, SupportsIndex):
        return None
    strength = arguments.get("strength")
    if isinstance(strength, float | int) and 0 <= strength < 1:  # the first steps are left out
        return index(steps) - int(index(steps) * (1 - strength))
    return index(steps)
