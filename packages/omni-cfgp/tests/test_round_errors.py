"""Errors of one rank reach all, and what a pipeline breaks off leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_rounds import Branches
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from toy_denoisers import (
    WIDTH,
    Cached,
    Failing,
    OfLists,
    Pipeline,
    Records,
    Toy,
    close,
    divide,
    failing,
    prompts_of,
)
from toy_results import seeded, text_of

from omni_cfgp.failure_marks import FailureMarks
from omni_group_coordinator import ParallelError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_parallel_state.denoising.waiting import resolve_all

LATENTS = seeded(1, 6, WIDTH, seed=5)


def fails_in_step(bad: int | None, branch: int) -> Any:
    """A pipeline whose branch has a prompt that fails in one of its steps."""

    def combined(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
        step = pipeline.memory["step"] = pipeline.memory.get("step", -1) + 1
        some = [failing(p) if (step, i) == (bad, branch) else p for i, p in enumerate(prompts)]
        return Pipeline.combined(pipeline, latents, some, t, 3.0)

    return combined


def outcome(pipeline: Any, prompts: Any, expected: Any) -> str:
    """The error of a request; ``none`` where its result is right."""
    pipeline.memory.clear()
    try:
        close(pipeline(prompts, latents=LATENTS).sample, expected)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors(branch: int, world: int, batched: bool) -> list[str]:
    prompts = prompts_of(3)
    expected = Pipeline(Toy())(prompts, latents=LATENTS).sample
    pipeline = Branches(Failing(), None)
    pipeline.batched = batched
    found = []
    with divide(pipeline, world):
        for bad in (0, 1, 2, None, 0, None):
            pipeline.own = fails_in_step(bad, branch)
            found.append(outcome(pipeline, prompts, expected))
    return found


OWN = "ZeroDivisionError: out of toys"


@pytest.mark.parametrize(("branch", "world", "rank"), [(0, 2, 0), (1, 2, 1), (2, 3, 2)])
def test_a_branch_that_raises_ends_the_request_on_all(
    ranks: Any, branch: int, world: int, rank: int
) -> None:
    """In the first step and in later ones; the next request is right."""
    other = f"ParallelError: guidance branch {branch} (transformer) failed on rank {rank}: {OWN}"
    results = ranks.run(errors, branch, world, False, world_size=world, timeout=30)
    for me, found in enumerate(results):
        error = OWN if me == rank else other
        assert found == [error, error, error, "none", error, "none"]


def test_a_row_that_raises_ends_the_request_on_all(ranks: Any) -> None:
    other = f"ParallelError: rows 2 to 2 of transformer failed on rank 1: {OWN}"
    for me, found in enumerate(ranks.run(errors, 2, 2, True, timeout=30)):
        # Whether rows can be computed apart is seen with the first call of all: all compute it.
        assert found[0] == OWN
        error = OWN if me else other
        assert found[1:] == [error, error, "none", error, "none"]


def heard_at_the_end(bad: int) -> list[str]:
    """On a device, other ranks hear of a failure in the next step, or at the end of the request."""
    prompts = prompts_of(2)
    expected = Pipeline(Toy())(prompts, latents=LATENTS).sample
    pipeline = Branches(Failing(), None)
    found = []
    with pytest.MonkeyPatch.context() as patch, divide(pipeline, 2):
        patch.setattr(FailureMarks, "failed_at_once", lambda _: [])
        for step in (None, bad, None, bad, None):
            pipeline.own = fails_in_step(step, 1)
            found.append(outcome(pipeline, prompts, expected))
    return found


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_failure_that_is_heard_later_leaves_later_requests_alone(ranks: Any, step: int) -> None:
    for rank, found in enumerate(ranks.run(heard_at_the_end, step, world_size=2)):
        assert found[::2] == ["none"] * 3
        for text in found[1::2]:
            assert text == OWN if rank == 1 else "out of toys" in text


def broken_off() -> None:
    """Between two calls of a step, before anything was needed."""

    def combined(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
        one = pipeline.transformer(latents, prompts[0], t[None])[0]
        pipeline.memory["old"] = one
        if pipeline.memory["breaks"] and float(t) < 0.9:
            raise KeyboardInterrupt
        return one - pipeline.transformer(latents, prompts[1], t[None])[0]

    prompts = prompts_of(2)
    pipeline = Branches(Cached(), combined)
    pipeline.memory["breaks"] = False
    expected = pipeline(prompts, latents=LATENTS).sample
    with divide(pipeline, 2):
        for breaks in (True, False, True, True, False):
            pipeline.memory["breaks"] = breaks
            pipeline.transformer.kept.clear()
            if breaks:
                with pytest.raises(KeyboardInterrupt):
                    pipeline(prompts, latents=LATENTS)
                old = pipeline.memory["old"] * 2
            else:
                close(pipeline(prompts, latents=LATENTS).sample, expected)
                with pytest.raises(ParallelError, match="was never computed"):
                    bool(old.sum())


def test_a_request_that_is_broken_off_leaves_nothing_behind(ranks: Any) -> None:
    ranks.run(broken_off, timeout=30)


def gradients() -> list[str]:
    toy = Toy()
    toy.weight.requires_grad_()
    prompts = prompts_of(2)
    texts = []
    for count in (1, 2):  # of rows: by branch, and where rows are tried
        latents = torch.cat([LATENTS] * count)
        with divide(toy, 2):
            texts.append(text_of(lambda latents=latents: toy(latents, prompts[0])[0] * 1 > 0))
            with torch.no_grad():
                close(toy(latents, prompts[1])[0] * 1, Toy()(latents, prompts[1])[0])
    return texts


def test_gradients_are_an_error_on_all(ranks: Any) -> None:
    for texts in ranks.run(gradients, timeout=30):
        for text in texts:
            assert "guidance over ranks is for inference" in text


def odd_result() -> list[str]:
    """What a call returns does not travel, or is of another shape than before."""
    texts = []
    toy = Toy(lambda sample: ({1, 2}, sample))
    with divide(toy, 2):
        texts.append(text_of(lambda: toy(LATENTS)[1] > 0))
        toy.wrap = lambda sample: (sample,)
        close(toy(LATENTS)[0] * 1, Toy()(LATENTS)[0])
        toy.wrap = lambda sample: (sample[:, :2],)
        texts.append(text_of(lambda: toy(LATENTS)[0] > 0))
        toy.wrap = lambda sample: (sample,)
        close(toy(LATENTS)[0] * 1, Toy()(LATENTS)[0])
    return texts


def test_results_that_cannot_be_exchanged_are_errors_on_all(ranks: Any) -> None:
    for first, second in ranks.run(odd_result, timeout=30):
        assert "returned a set, which does not travel between ranks" in first
        assert "returned float32 (1, 2, 8) where it returned float32 (1, 6, 8)" in second


# -- what is told ------------------------------------------------------------------------------


class Store:
    """Something that a call writes to."""

    def __init__(self) -> None:
        self.calls = 0


class Writing(Toy):
    def forward(self, latents: Tensor, text: Any, t: Any, store: Any = None, **more: Any) -> Any:
        if store is not None:
            store.calls += 1
        if "kv_cache" in more:
            more["kv_cache"]["seen"] = more["kv_cache"].get("seen", 0) + 1
        return super().forward(latents, text, t)


def caches(kind: str) -> tuple[list[int], list[str]]:
    store: Any = Store() if kind == "store" else {}

    def combined(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
        one, other = (
            pipeline.transformer(latents, p, t[None], **{kind: store})[0] for p in prompts
        )
        return one - other

    prompts = prompts_of(2)
    pipeline = Branches(Writing(), combined)
    expected = pipeline(prompts, latents=LATENTS).sample
    counts = []
    with divide(pipeline, 2), Records() as records:
        for _ in range(2):
            close(pipeline(prompts, latents=LATENTS).sample, expected)
            counts.append(store.calls if kind == "store" else store["seen"])
    return counts, records.texts


@pytest.mark.parametrize("kind", ["store", "kv_cache"])
def test_calls_that_write_to_a_cache_are_made_everywhere_which_is_told_once(
    ranks: Any, kind: str
) -> None:
    for counts, texts in ranks.run(caches, kind):
        assert counts == [12, 18]
        assert texts == [
            "calls of transformer that pass a cache, or other objects that the call may change, "
            "are made on every rank"
        ]


def idle() -> list[list[str]]:
    found = []
    for count, unguided, batched in ((1, [], False), (2, [0, 2], False), (3, [], True)):
        pipeline = Pipeline(Toy(), batched=batched)
        with divide(pipeline, 3):
            for _ in range(2):
                with Records() as records:
                    pipeline(prompts_of(count), latents=LATENTS, unguided=unguided)
                found.append(records.texts)
    return found


def test_a_request_without_guidance_is_told(ranks: Any) -> None:
    text = (
        "Pipeline gave 2 of the 3 ranks of the cfg group nothing to do: its model is distilled, "
        "guidance was off (no negative prompt, a scale of 1), or it needs each prediction before "
        "it asks for the next"
    )
    for found in ranks.run(idle, world_size=3):
        assert found == [[text], [text], [], [], [], []]


def needed_at_once() -> tuple[list[str], int]:
    """A pipeline that looks at each prediction before it asks for the next."""

    def combined(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
        found = []
        for prompt in prompts:
            found.append(pipeline.transformer(latents, prompt, t[None])[0])
            float(found[-1].sum())
        return found[0] - found[1] + found[2]

    prompts = prompts_of(3)
    pipeline = Branches(Toy(), combined)
    expected = pipeline(prompts, latents=LATENTS).sample
    before = pipeline.transformer.calls
    with divide(pipeline, 2), Records() as records:
        for _ in range(2):
            close(pipeline(prompts, latents=LATENTS).sample, expected)
    told = [text for text in records.texts if "needed before the next one" in text]
    return told, pipeline.transformer.calls - before


def test_predictions_that_are_needed_at_once_are_computed_on_every_rank(ranks: Any) -> None:
    """Which is told once."""
    for rank, (told, calls) in enumerate(ranks.run(needed_at_once)):
        assert told == [
            "each prediction of transformer is needed before the next one of its step is asked "
            "for, so the later ones are made on every rank"
        ]
        assert calls == (2 * 3 * 2 if rank else 2 * 3 * 3)


# -- who computes ------------------------------------------------------------------------------


def lists() -> int:
    """Branches whose inputs are lists are as much work as others."""
    toy = OfLists()
    x, times = [seeded(5, WIDTH)], seeded(1)
    texts = [[seeded(3, WIDTH, seed=i)] for i in range(4)]
    expected = [toy(x, times, text)[0][0] for text in texts]
    toy.toy.calls = 0
    with divide(toy, 2):
        found = [toy(x, times, text) for text in texts]
        for one, wanted in zip(found, expected, strict=True):
            close(resolve_all(one)[0][0], wanted)
    return toy.toy.calls


def test_branches_of_lists_are_divided(ranks: Any) -> None:
    assert ranks.run(lists) == [2, 2]


def sharded(count: int, batched: bool) -> tuple[int, int]:
    """Each rank gathers the weights as often as the others."""
    prompts = prompts_of(count)
    expected = Pipeline(Toy(), batched=batched)(prompts, latents=LATENTS).sample
    toy = Toy()
    state = ParallelState(ParallelLayout(cfg=2, fs=2))
    fully_shard(toy, mesh=state.mesh("fs"))
    pipeline = Pipeline(toy, batched=batched)
    with divide(pipeline, 2):
        for _ in range(2):
            toy.calls = 0
            close(pipeline(prompts, latents=LATENTS).sample, expected)
    return toy.calls, 3 * -(-count // 2)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_denoiser_with_sharded_weights_is_called_as_often_on_all_ranks(
    ranks: Any, count: int, batched: bool
) -> None:
    for calls, expected in ranks.run(sharded, count, batched, timeout=40):
        assert calls == (3 if batched else expected)
