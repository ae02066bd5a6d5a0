"""The shipped model draws the same pictures on one process and on several ranks."""

from __future__ import annotations

import pytest

from omni_parallel.demo.launch import launch
from omni_parallel.demo.layouts import FusedLayout, layout_name
from omni_parallel.demo.request import PROMPTS, DemoRequest
from omni_parallel.demo.table import TOLERANCE
from omni_parallel_state import ParallelLayout

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("layout", "request_"),
    [
        (
            ParallelLayout(ulysses=2),
            DemoRequest(steps=4, prompts=("a red circle left of a blue square",), seed=5),
        ),
        (
            ParallelLayout(ulysses=3),
            DemoRequest(steps=2, width=144, height=80, prompts=PROMPTS[:2]),
        ),  # 45 tokens, 4 heads: heads do not divide
        (ParallelLayout(ring=2), DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1])),
        (ParallelLayout(cfg=2), DemoRequest(steps=2, width=64, height=64, prompts=PROMPTS[:2])),
        (
            ParallelLayout(cfg=2, ulysses=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),  # 15 tokens
        (
            ParallelLayout(vae=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:2]),
        ),  # 10 columns of a latent
        (
            ParallelLayout(cfg=2, vae=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelLayout(ulysses=2, vae=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (ParallelLayout(fs=2), DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1])),
        (
            ParallelLayout(ulysses=2, fs=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelLayout(cfg=2, fs=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelLayout(ulysses=2, fs=2, vae=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (ParallelLayout(pp=2), DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:3])),
        (ParallelLayout(pp=3), DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1])),
        (
            ParallelLayout(cfg=2, pp=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:2]),
        ),
        (
            ParallelLayout(pp=2, ulysses=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelLayout(pp=2, ulysses=2, fs=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelLayout(pp=2, ring=2, vae=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
    ],
    ids=lambda value: layout_name(value) if isinstance(value, ParallelLayout) else "",
)
def test_pictures_of_several_ranks_are_those_of_one_process(
    layout: ParallelLayout, request_: DemoRequest
) -> None:
    steps: list[int] = []
    single = launch(request_, ParallelLayout(), steps.append)
    assert single.pictures[0].shape == (len(request_.prompts), 3, request_.height, request_.width)
    assert single.pictures[0].std() > 0.01, "an empty picture would equal any other"
    assert single.bytes_per_step == 0
    run = launch(request_, layout, steps.append)
    assert len(run.pictures) == len(run.reports) == layout.world_size
    assert run.difference(single) <= (1e-5 if layout.pp > 1 else TOLERANCE)
    assert run.bytes_per_step > 0 or layout.fs > 1, "torch gathers weights, which is not counted"
    shared = layout.fs > 1 or layout.pp > 1
    assert (run.weight_bytes < 0.8 * single.weight_bytes) == shared
    assert 0 < run.peak_bytes < 10**11
    assert max(steps, default=0) <= request_.steps


@pytest.mark.parametrize(("stages", "steps", "vae"), [(2, 6, 1), (3, 20, 1), (2, 6, 2)])
def test_pipefusion_draws_nearly_the_pictures_of_one_process(
    stages: int, steps: int, vae: int
) -> None:
    request = DemoRequest(steps=steps, prompts=PROMPTS[:2])
    single = launch(request, ParallelLayout(), lambda _: None)
    run = launch(request, FusedLayout(pp=stages, vae=vae), lambda _: None)
    assert 35 <= run.worst_psnr(single) < 60
    assert 1e-3 < run.difference(single) < 0.5, "an approximation that is none shows nothing"
    assert all((one - run.pictures[0]).abs().max() <= 1e-5 for one in run.pictures)
    assert run.bytes_per_step > 0
    assert run.weight_bytes < 0.8 * single.weight_bytes
    assert single.worst_psnr(single) == float("inf")


def test_what_a_failing_rank_said_is_in_the_error() -> None:
    """A seed that no generator takes fails in every rank."""
    with pytest.raises(RuntimeError, match=r"(?s)rank \d was the first to fail.*seed"):
        launch(DemoRequest(steps=1, seed=-(2**70)), ParallelLayout(ulysses=2), lambda _: None)
