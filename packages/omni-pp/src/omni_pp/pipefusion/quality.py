"""How far PipeFusion strays from the exact result, and where that is too far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    (2, 1): {4: 39.1, 6: 41.6, 10: 44.5, 20: 50.1, 50: 57.6},
    (2, 2): {4: 41.6, 6: 42.5, 10: 45.5, 20: 50.6, 50: 57.9},
    (2, 3): {4: 46.0, 6: 44.9, 10: 46.4, 20: 50.8, 50: 58.1},
    (2, 4): {6: 47.4, 10: 47.8, 20: 51.2, 50: 58.1},
    (4, 1): {4: 36.7, 6: 38.2, 10: 42.3, 20: 48.1, 50: 55.7},
    (4, 2): {4: 38.4, 6: 40.1, 10: 43.9, 20: 48.8, 50: 56.1},
    (4, 3): {4: 41.8, 6: 41.7, 10: 44.0, 20: 49.4, 50: 56.3},
    (4, 4): {6: 43.7, 10: 44.9, 20: 49.1, 50: 56.5},
    (8, 1): {4: 35.4, 6: 36.6, 10: 40.3, 20: 45.6, 50: 53.0},
    (8, 2): {4: 36.6, 6: 38.1, 10: 41.2, 20: 46.1, 50: 53.4},
    (8, 3): {4: 40.3, 6: 39.4, 10: 41.3, 20: 46.4, 50: 53.5},
    (8, 4): {6: 41.4, 10: 41.9, 20: 46.2, 50: 53.5},
}
"""By patches and exact steps, then by steps in all: PSNR in dB against the exact picture.

The mean of four prompts at 128 x 128 pixels (64 image tokens), guidance 3.0, of the trained model
that omni-parallel ships. The largest difference of an element was 0.39 of the range at 4 steps,
0.30 at 6, 0.23 at 10, 0.13 at 20 and 0.05 at 50. Another model may differ: compare its pictures by
`difference`."""

GOOD_ENOUGH = 40.0
"""PSNR in dB below which settings are refused."""


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
            f"give a picture that strays too far from the exact one; legal: {fewest} steps and "
            f"more, warmup_steps={steps} (all exact), or force=True"
        )
        raise ParallelConfigError(msg)


def steps_of(arguments: Mapping[str, Any]) -> int | None:
    """How many steps a request has; ``None`` if its arguments do not say.

    Args:
        arguments: Of the pipeline's call by name, with its defaults.
    """
    for name in ("timesteps", "sigmas"):
        if isinstance(given := arguments.get(name), Sequence):
            return len(given)
    steps = arguments.get("num_inference_steps")
    return steps if isinstance(steps, int) else None
