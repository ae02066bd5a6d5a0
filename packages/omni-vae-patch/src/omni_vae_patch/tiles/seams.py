"""How visible the borders of tiles are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError


def seam_score(tiled: Tensor, borders: tuple[Sequence[int], Sequence[int]]) -> float:
    """The mean step across borders of tiles, as a multiple of the mean step elsewhere.

    1.0 is a picture whose borders are like the rest of it. It says nothing of a tone that
    shifts slowly from tile to tile, as it does where tiles are blended over a wide overlap.

    Args:
        tiled: ``(..., height, width)``.
        borders: The rows, and the columns, at which a tile begins.

    Raises:
        ParallelConfigError: No borders, ones outside the picture, or nothing but borders.
    """
    across: list[Tensor] = []
    elsewhere: list[Tensor] = []
    for dim, places in ((-2, borders[0]), (-1, borders[1])):
        length = tiled.shape[dim]
        wrong = [place for place in places if not 0 < place < length]
        if wrong:
            msg = (
                f"borders {wrong} are outside dimension {dim} of length {length}; legal here: 1 "
                f"to {length - 1} (the first row or column of a tile, not of the picture)"
            )
            raise ParallelConfigError(msg)
        if not places:
            continue
        steps = tiled.float().diff(dim=dim).abs().movedim(dim, 0).flatten(1)
        seam = torch.zeros(length - 1, dtype=torch.bool, device=tiled.device)
        seam[[place - 1 for place in places]] = True
        across.append(steps[seam].flatten())
        elsewhere.append(steps[~seam].flatten())
    if not across or not sum(part.numel() for part in elsewhere):
        msg = "seam_score compares borders with the rest of the picture, and needs some of both"
        raise ParallelConfigError(msg)
    at, rest = torch.cat(across).mean().item(), torch.cat(elsewhere).mean().item()
    if rest:
        return at / rest
    return float("inf") if at else 1.0
