"""Steps follow each other through the stages without waiting for all patches of the one before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepened_pipelines import build
from pipefusion_cases import arguments, distance, fused
from stale_reference import StaleReference
from stock_pipelines import CASES, picture

from omni_pp.pipefusion.patch_values import Values
from omni_pp.stages.staged_denoiser import StagedDenoiser
from rank_harness import RankPool

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:In CPU autocast:UserWarning"
)
PATCHES = 3


class Watch:
    """Notes on the first stage which patches it computes and which results it waits for."""

    def __init__(self, model: Any, first_block: Any) -> None:
        self.events: list[str] = []
        self.index = 0
        self._hooks = [
            first_block.register_forward_hook(lambda *_: self.note("run")),
        ]
        self._take = StagedDenoiser.take_result

        def take(piece: Any) -> None:
            if piece.arriving_result is not None:
                self.note("take")
            self._take(piece)

        StagedDenoiser.take_result = staticmethod(take)  # type: ignore[method-assign]

    def note(self, what: str) -> None:
        self.events.append(what)

    def stop(self) -> None:
        StagedDenoiser.take_result = staticmethod(self._take)  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def order_of_work(name: str, steps: int) -> list[str]:
    pipeline = build(name)
    with fused(pipeline, 2, patches=PATCHES) as handle:
        pipeline(**arguments(name, pipeline, num_inference_steps=steps))
        (partition,) = handle.partitions.values()
        blocks = partition.blocks_of(partition.stage)
        watch = Watch(pipeline.transformer, blocks[0][1])
        pipeline(**arguments(name, pipeline, num_inference_steps=steps))
        watch.stop()
    return watch.events


@pytest.mark.parametrize("name", ["Flux", "Wan", "Stable Diffusion 3"])
def test_a_patch_waits_for_its_own_of_the_step_before_and_no_other(
    ranks: RankPool, name: str
) -> None:
    steps, calls = 4, CASES[name].calls_per_step
    events = ranks.run(order_of_work, name, steps, timeout=120)[0]
    exact = ["run"] * calls + ["take"] * calls
    assert events[: 2 * calls] == exact
    found = "".join(one[0] for one in events[2 * calls :])
    first = "r" * PATCHES
    # Of the first call of a later step, each patch takes those of all branches, and runs.
    later = ("t" * calls + "r") * PATCHES
    # Of a further branch nothing is waited for before it runs; then for the branch before it,
    # which the first call of the next step finds arrived.
    expected = first if calls == 1 else first + "r" * PATCHES + "t" * PATCHES
    if calls == 1:
        expected += later * (steps - 2) + "t" * PATCHES
    else:
        step = "tr" * PATCHES + "r" * PATCHES + "t" * PATCHES
        expected += step * (steps - 2) + "t" * PATCHES
    assert found == expected


Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def sharpen(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Needs all elements at once."""
    latents = given["latents"]
    return {"latents": latents * (1 + 0.01 * latents.std())}


def in_place(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    given["latents"][:, :1] += 0.125
    return {"latents": given["latents"].mul_(0.99)}


def flipped(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"].flip(1)}


@torch.no_grad()
def with_callback(name: str, callback: Callback) -> float:
    more = {"callback_on_step_end": callback}
    reference = build(name)
    StaleReference(reference.transformer, PATCHES, 1, CASES[name].calls_per_step)
    expected = picture(reference(**arguments(name, reference, **more)))
    pipeline = build(name)
    with fused(pipeline, 2, patches=PATCHES):
        return distance(picture(pipeline(**arguments(name, pipeline, **more))), expected)


@pytest.mark.parametrize("callback", [sharpen, in_place, flipped])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_what_needs_all_elements_is_right_too(
    ranks: RankPool, name: str, callback: Callback
) -> None:
    assert max(ranks.run(with_callback, name, callback, timeout=120)) <= 1e-5


@torch.no_grad()
def values_alive(name: str, steps: int) -> list[int]:
    """How many values are alive at the end of each step."""
    pipeline = build(name)
    counts: list[int] = []

    def count(pipeline: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        gc.collect()
        counts.append(sum(issubclass(type(one), Values) for one in gc.get_objects()))
        return {}

    with fused(pipeline, 2, patches=2):
        pipeline(**arguments(name, pipeline, num_inference_steps=steps, callback_on_step_end=count))
    del pipeline
    gc.collect()
    return [*counts, sum(issubclass(type(one), Values) for one in gc.get_objects())]


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_memory_does_not_grow_with_steps(ranks: RankPool, name: str) -> None:
    for counts in ranks.run(values_alive, name, 10, timeout=120):
        assert max(counts[3:-1]) <= counts[3]
        assert counts[3] > 0
        assert counts[-1] == 0


@torch.no_grad()
def failing_at_the_end(name: str, stage: int) -> tuple[str, bool]:
    """The error of a request whose very last patch fails, and whether latents came out before."""
    pipeline, seen = build(name), 0
    steps = 4

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        seen += 1
        calls = CASES[name].calls_per_step
        if seen == calls + (steps - 1) * calls * PATCHES:
            raise ZeroDivisionError

    text, came = "none", False
    with fused(pipeline, 2, patches=PATCHES) as handle:
        (partition,) = handle.partitions.values()
        hook = None
        if partition.stage == stage:
            block = partition.blocks_of(stage)[0][1]
            hook = block.register_forward_pre_hook(fail, with_kwargs=True)
        try:
            pipeline(**arguments(name, pipeline, num_inference_steps=steps))
            came = True
        except Exception as error:
            text = f"{type(error).__name__} {error}"
        if hook is not None:
            hook.remove()
        pipeline(**arguments(name, pipeline, num_inference_steps=steps))
    return text, came


@pytest.mark.parametrize("stage", [0, 1])
def test_the_last_patch_of_all_may_fail(ranks: RankPool, stage: int) -> None:
    found = ranks.run(failing_at_the_end, "Flux", stage, timeout=120)
    for rank, (text, came) in enumerate(found):
        assert not came
        expected = "ZeroDivisionError" if rank == stage else f"stage {stage} failed: ZeroDivision"
        assert expected in text
