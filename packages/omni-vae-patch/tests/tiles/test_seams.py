"""How visible the borders of tiles are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.tiles import seam_score


def picture(height: int = 64, width: int = 48) -> Tensor:
    """Smooth, with noise of which every row and column has as much."""
    generator = torch.Generator().manual_seed(0)
    down, across = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.randn(2, 3, height, width, generator=generator) + down + across


def with_steps(size: float) -> Tensor:
    """Every second tile is lighter."""
    found = picture()
    found[..., 16:32, :] += size
    found[..., 48:, :] += size
    found[..., 24:] += size
    return found


BORDERS = ([16, 32, 48], [24])


def test_a_picture_without_steps_scores_one() -> None:
    assert seam_score(picture(), BORDERS) == pytest.approx(1.0, abs=0.05)


def test_larger_steps_score_more() -> None:
    scores = [seam_score(with_steps(size), BORDERS) for size in (0.0, 1.0, 4.0, 16.0)]
    assert scores == sorted(scores)
    assert scores[1] > 1.15
    assert scores[3] > 10


def test_a_border_that_is_blurred_scores_less_than_one() -> None:
    found = picture()
    found[..., 24] = found[..., 23]
    assert seam_score(found, ([], [24])) == 0.0


def test_borders_one_off_are_not_borders() -> None:
    moved = tuple([place + 1 for place in places] for places in BORDERS)
    assert seam_score(with_steps(4.0), moved) < 1.0


def test_videos_and_half_precision_and_one_direction() -> None:
    video = with_steps(4.0)[:, :, None].expand(-1, -1, 5, -1, -1).bfloat16()
    assert seam_score(video, BORDERS) == pytest.approx(
        seam_score(with_steps(4.0), BORDERS), rel=0.02
    )
    assert seam_score(with_steps(4.0), ([16, 32, 48], [])) > 2


def test_flat_pictures() -> None:
    flat = torch.zeros(1, 3, 8, 8)
    assert seam_score(flat, ([4], [])) == 1.0
    flat[..., 4:, :] = 1
    assert seam_score(flat, ([4], [])) == float("inf")


@pytest.mark.parametrize("borders", [([0], []), ([], [48]), ([], []), (list(range(1, 64)), [])])
def test_borders_that_are_none_are_refused(borders: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ParallelConfigError):
        seam_score(picture(), borders)
