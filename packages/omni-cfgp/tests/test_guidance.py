"""The formulas of guidance."""

from __future__ import annotations

import pytest
import torch
from toy_denoisers import close
from toy_results import seeded

from omni_cfgp import guided, guided_by_stages, rescaled
from omni_cfgp.guidance import stage_scales
from omni_group_coordinator import ParallelConfigError

FULL, IMAGE, NONE = (seeded(2, 3, 4, seed=i) for i in range(3))


def test_guidance_goes_from_the_negative_through_the_positive():
    close(guided(FULL, NONE, 1.0), FULL)
    close(guided(FULL, NONE, 0.0), NONE)
    close(guided(FULL, NONE, 4.0), 4 * FULL - 3 * NONE)
    assert torch.equal(guided_by_stages([FULL, NONE], [4.0]), guided(FULL, NONE, 4.0))


def test_three_branches_are_those_of_instruct_pix2pix():
    """Equation 3 of arXiv 2211.09800, of text with image, image alone, and neither."""
    text_scale, image_scale = 7.5, 1.5
    expected = NONE + image_scale * (IMAGE - NONE) + text_scale * (FULL - IMAGE)
    scales = stage_scales({"text": text_scale, "image": image_scale}, 3)
    close(guided_by_stages([FULL, IMAGE, NONE], scales), expected)


@pytest.mark.parametrize(("scale", "branches"), [(3.0, 3), ({"a": 1.0}, 4), ({"a": 1.0}, 1)])
def test_a_branch_without_a_scale_is_an_error(scale, branches):
    with pytest.raises(ParallelConfigError, match=rf"1 guidance scales for {branches} branches"):
        stage_scales(scale, branches)


def test_the_rescaled_prediction_is_as_long_as_the_conditional_one():
    found = rescaled(FULL, 5 * IMAGE)
    close(found.norm(dim=-1), FULL.norm(dim=-1))
    close(found / found.norm(dim=-1, keepdim=True), IMAGE / IMAGE.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_stay_zeros_and_never_become_nan(dtype):
    some = FULL.clone().to(dtype)
    some[0, 1] = 0
    found = rescaled(FULL.to(dtype), some)
    assert torch.equal(found[0, 1], torch.zeros(4, dtype=dtype))
    assert found.isfinite().all()
    zero = torch.zeros_like(some)
    assert torch.equal(rescaled(zero, zero), zero)
    assert torch.equal(rescaled(zero, some), zero)
