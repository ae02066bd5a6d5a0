"""Merged parts of attention equal attention over all of them, whatever their scores are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from omni_sp.attention.merge import MergedAttention


def merged(parts: list[tuple[float, float]], dtype: torch.dtype = torch.float32) -> list[float]:
    """One query with parts of an output (twice) and a log-sum-exp."""

    def row(value: float) -> Tensor:
        return torch.tensor([value], dtype=dtype).view(1, 1, 1)

    into = MergedAttention(dtype)
    for out, lse in parts:
        into.add(row(out).unsqueeze(-1).expand(1, 1, 1, 2), row(lse))
    result = into.result(dtype)
    assert result is not None
    return result.flatten().tolist()


@pytest.mark.parametrize("low", [0.0, -1e4, -1e9, -3e38, 1e9])
def test_parts_of_equal_weight_are_averaged_however_low_their_scores(low: float) -> None:
    # So low that what a second part adds to the log-sum-exp, log(2), is lost in rounding.
    assert merged([(2.0, low), (6.0, low)]) == pytest.approx([4.0, 4.0])
    assert merged([(6.0, low), (2.0, low)]) == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("other", [-1e4, -1e9, -3e38, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_part_that_weighs_nothing_leaves_the_other_exact(other: float, first: bool) -> None:
    parts = [(0.3, 1.5), (1e30, other)]
    assert merged(parts if first else parts[::-1]) == pytest.approx([0.3, 0.3], rel=1e-6)


def test_parts_that_attend_to_nothing_count_for_nothing() -> None:
    assert merged([(0.0, -math.inf), (0.0, -math.inf)]) == [0.0, 0.0]
    assert merged([(0.0, -math.inf), (7.0, -3.0), (0.0, -math.inf)]) == [7.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_parts_are_weighed_by_the_exponential_of_their_scores(dtype: torch.dtype) -> None:
    parts = [(1.0, 0.0), (-2.0, 1.0), (5.0, -2.0), (3.0, 20.0), (4.0, 19.5), (-9.0, 20.5)]
    total = math.fsum(math.exp(lse) for _, lse in parts)
    expected = math.fsum(out * math.exp(lse) for out, lse in parts) / total
    for order in (parts, parts[::-1]):
        assert merged(order, dtype) == pytest.approx([expected] * 2, rel=1e-5)
