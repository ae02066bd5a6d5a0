"""The formulas that make one prediction of those of the guidance branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError

Prediction = Tensor | tuple[Tensor, ...]
"""What a denoiser predicts; of several outputs, such as video and sound, a tuple."""


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``negative + scale * (positive - negative)``.

    Ho and Salimans, arXiv 2207.12598.
    """
    return negative + scale * (positive - negative)


def guided_by_stages(predictions: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Guidance by several conditions, each with a scale of its own.

    ``p[n] + sum(s[i] * (p[i] - p[i + 1]))`` of predictions with ever fewer conditions. With two
    it is `guided`, with three that of InstructPix2Pix (Brooks and others, arXiv 2211.09800).

    Args:
        predictions: Of the branches, that with all conditions first, that with none last.
        scales: One for each step from a branch to the next, one less than there are branches.
    """
    found = predictions[-1]
    for more, fewer, scale in zip(predictions, predictions[1:], scales, strict=False):
        found = found + scale * (more - fewer)
    return found


def stage_scales(scale: float | Mapping[str, float], branches: int) -> list[float]:
    """The scales for `guided_by_stages`.

    Args:
        scale: A number, for two branches; else a scale for each step, in order, by any names.
        branches: How many there are.

    Raises:
        ParallelConfigError: Another number of scales than there are steps from branch to branch.
    """
    scales = list(scale.values()) if isinstance(scale, Mapping) else [scale]
    if len(scales) != branches - 1:
        msg = (
            f"{len(scales)} guidance scales for {branches} branches, of which "
            f"{branches - 1 - len(scales)} would count for nothing; pass a dict of "
            f"{branches - 1} scales in the order of the branches, or override "
            "combine_multi_branch_cfg_noise"
        )
        raise ParallelConfigError(msg)
    return [float(one) for one in scales]


def rescaled(condition: Tensor, combined: Tensor) -> Tensor:
    """The combined prediction, as long as the conditional one along the last dimension.

    What has no length stays as it is.
    """
    wide = torch.promote_types(combined.dtype, torch.float32)  # squares overflow in half precision
    length = torch.linalg.vector_norm(combined, dim=-1, keepdim=True, dtype=wide)
    wanted = torch.linalg.vector_norm(condition, dim=-1, keepdim=True, dtype=wide)
    # Where the length is zero so is every element, by whatever it is multiplied.
    found: Tensor = combined * (wanted / torch.where(length > 0, length, torch.ones_like(length)))
    return found.to(combined.dtype)
