"""The shipped model draws the same pictures on one process and on several ranks."""

from __future__ import annotations

import pytest

from omni_parallel.comparable import not_refused
from omni_parallel.demo.launch import launch
from omni_parallel.demo.request import PROMPTS, DemoRequest
from omni_parallel.demo.table import TOLERANCE
from omni_parallel.v1 import ParallelConfig

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("config", "request_"),
    [
        (
            ParallelConfig(ulysses=2),
            DemoRequest(steps=4, prompts=("a red circle left of a blue square",), seed=5),
        ),
        (
            ParallelConfig(ulysses=3),
            DemoRequest(steps=2, width=144, height=80, prompts=PROMPTS[:2]),
        ),  # 45 tokens, 4 heads: heads do not divide
        (ParallelConfig(ring=2), DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1])),
        (ParallelConfig(cfg=2), DemoRequest(steps=2, width=64, height=64, prompts=PROMPTS[:2])),
        (
            ParallelConfig(cfg=2, ulysses=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),  # 15 tokens
        (
            ParallelConfig(vae_patch=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:2]),
        ),  # 10 columns of a latent
        (
            ParallelConfig(cfg=2, vae_patch=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelConfig(ulysses=2, vae_patch=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (ParallelConfig(hsdp=2), DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1])),
        (
            ParallelConfig(ulysses=2, hsdp=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelConfig(cfg=2, hsdp=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelConfig(ulysses=2, hsdp=2, vae_patch=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (ParallelConfig(pp=2), DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:3])),
        (ParallelConfig(pp=3), DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1])),
        (
            ParallelConfig(cfg=2, pp=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:2]),
        ),
        (
            ParallelConfig(pp=2, ulysses=2),
            DemoRequest(steps=2, width=80, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelConfig(pp=2, ulysses=2, hsdp=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
        (
            ParallelConfig(pp=2, ring=2, vae_patch=2),
            DemoRequest(steps=2, width=64, height=48, prompts=PROMPTS[:1]),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, ParallelConfig) else "",
)
def test_pictures_of_several_ranks_are_those_of_one_process(
    config: ParallelConfig, request_: DemoRequest
) -> None:
    steps: list[int] = []
    single = launch(request_, ParallelConfig(), 1, steps.append)
    assert single.pictures[0].shape == (len(request_.prompts), 3, request_.height, request_.width)
    assert single.pictures[0].std() > 0.01, "an empty picture would equal any other"
    assert single.bytes_per_step == 0
    run = launch(request_, config, config.ranks, steps.append)
    assert len(run.pictures) == len(run.reports) == config.ranks
    assert run.difference(single) <= (1e-5 if config.pp > 1 else TOLERANCE)
    assert run.bytes_per_step > 0 or config.hsdp > 1, "torch gathers weights, which is not counted"
    shared = config.hsdp > 1 or config.pp > 1
    assert (run.weight_bytes < 0.8 * single.weight_bytes) == shared
    assert 0 < run.peak_bytes < 10**11
    assert max(steps, default=0) <= request_.steps


@pytest.mark.parametrize(("stages", "steps", "vae"), [(2, 6, 1), (3, 20, 1), (2, 6, 2)])
def test_pipefusion_draws_nearly_the_pictures_of_one_process(
    stages: int, steps: int, vae: int
) -> None:
    request = DemoRequest(steps=steps, prompts=PROMPTS[:2])
    single = launch(request, ParallelConfig(), 1, lambda _: None)
    config = not_refused(ParallelConfig(pipefusion=stages, vae_patch=vae))
    run = launch(request, config, stages, lambda _: None)
    assert 35 <= run.worst_psnr(single) < 60
    assert 1e-3 < run.difference(single) < 0.5, "an approximation that is none shows nothing"
    assert all((one - run.pictures[0]).abs().max() <= 1e-5 for one in run.pictures)
    assert run.bytes_per_step > 0
    assert run.weight_bytes < 0.8 * single.weight_bytes
    assert single.worst_psnr(single) == float("inf")


def test_what_a_failing_rank_said_is_in_the_error() -> None:
    """A seed that no generator takes fails in every rank."""
    with pytest.raises(RuntimeError, match=r"(?s)rank \d was the first to fail.*seed"):
        launch(DemoRequest(steps=1, seed=-(2**70)), ParallelConfig(ulysses=2), 2, lambda _: None)
