"""Unmodified pipelines of diffusers give the single process's picture, whoever computes what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from stock_pipelines import CASES, picture
from torch import Tensor

from omni_cfgp import apply_cfg_parallel
from omni_group_coordinator import record_traffic
from omni_parallel_state import ParallelLayout, ParallelState


@torch.no_grad()
def both(name: str, cfg: int) -> dict[str, Any]:
    """The picture of one process and twice that of the ranks, and who did what."""
    case = CASES[name]
    pipeline = case.build()
    alone = picture(pipeline(**case.arguments(pipeline)))
    modules = [getattr(pipeline, part) for part in case.denoisers]
    objects = [pipeline, pipeline.scheduler, *modules]
    before = [(type(one), dict(vars(one))) for one in objects[2:]]
    classes = [type(one) for one in objects]
    forwards = []
    hooks = [m.register_forward_hook(lambda *_: forwards.append(1)) for m in modules]
    handle = apply_cfg_parallel(pipeline, state=ParallelState(ParallelLayout(cfg=cfg)))
    first = picture(pipeline(**case.arguments(pipeline)))
    forwards.clear()
    with record_traffic() as traffic:
        second = picture(pipeline(**case.arguments(pipeline)))
    made = len(forwards)
    handle.remove()
    for hook in hooks:
        hook.remove()
    restored = [(type(one), dict(vars(one))) for one in objects[2:]] == before
    return {
        "alone": alone,
        "pictures": [first, second],
        "forwards": made,
        "gathers": traffic.calls["all_gather"],
        "restored": restored and [type(one) for one in objects] == classes,
        "real": all(type(one) is Tensor for one in (first, second)),
    }


def check(ranks: Any, name: str, cfg: int, tolerance: float = 1e-5) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = ranks.run(both, name, cfg, world_size=cfg)
    for result in results:
        for found in result["pictures"]:
            scale = result["alone"].abs().max()
            assert (found - result["alone"]).abs().max() <= tolerance * scale
        assert result["restored"]
        assert result["real"]
    for found in results[1:]:
        assert torch.equal(found["pictures"][1], results[0]["pictures"][1])
    return results


# diffusers' own: numpy 2 in its schedulers, new names, and autocast to float32 on the CPU.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_picture_of_one(ranks, name):
    results = check(ranks, name, 2)
    case = CASES[name]
    # Nobody computed everything, and a flush is one collective.
    if case.kind == "branches":
        assert all(result["forwards"] < case.calls_per_step * 3 for result in results)
    assert all(result["gathers"] <= case.calls_per_step * 3 for result in results)


MANY = ["Instruct Pix2Pix, three branches", "HunyuanImage, three branches", "LTX-2, four branches"]


@pytest.mark.parametrize("name", ["Flux", "Stable Diffusion 3", *MANY])
def test_three_ranks_take_what_branches_there_are(ranks, name):
    # A UNet rounds otherwise with one row than with three, and its sampler makes more of that: one
    # process that computes row by row differs by 1.2e-5 from the one that computes all rows.
    check(ranks, name, 3, tolerance=2e-5 if "Pix2Pix" in name else 1e-5)


def test_the_guide_lists_every_pipeline():
    guide = Path(__file__).parents[3] / "docs" / "guides" / "guidance.md"
    table = (
        guide.read_text().split("<!-- pipelines:begin -->")[1].split("<!-- pipelines:end -->")[0]
    )
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    kinds = {"batch": "rows", "branches": "branches"}
    tested = {(type(case.build()).__name__, kinds[case.kind]) for case in CASES.values()}
    assert sorted(listed) == sorted(tested)


CACHES = {
    "Mochi": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "LTX-Video, rescaled": lambda: diffusers.FirstBlockCacheConfig(threshold=0.3),
    "Flux": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2),
}


@torch.no_grad()
def cached(name: str, images: int) -> float:
    """The picture of the ranks where features are cached, against that of one process."""
    case, found = CASES[name], []
    for divided in (False, True):
        pipeline = case.build()
        pipeline.transformer.enable_cache(CACHES[name]())
        more = case.arguments(pipeline) | {"num_inference_steps": 6}
        if images > 1:
            more |= {"num_images_per_prompt": images}
        if divided:
            apply_cfg_parallel(pipeline, state=ParallelState(ParallelLayout(cfg=2)))
        found.append(picture(pipeline(**more)))
    return float((found[1] - found[0]).abs().max() / found[0].abs().max())


@pytest.mark.parametrize(("name", "images"), [*((name, 1) for name in CACHES), ("Flux", 2)])
def test_caches_of_features_change_nothing(ranks, name, images):
    for error in ranks.run(cached, name, images):
        assert error <= 1e-5
