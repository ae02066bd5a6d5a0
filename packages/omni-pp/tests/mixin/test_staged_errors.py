"""An error on one stage is one of every stage, nobody waits, and the next request is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_results import text_of
from toy_staged_pipelines import Ends, Staged, Transformer, TwoAtOnce, alone, in_stages, seeded

from omni_parallel_state import get_parallel_state
from omni_parallel_state.denoising.waiting import resolve

OWN = "ZeroDivisionError: out of toys"


class Failing(Staged):
    """Fails in some step, on some rank, in some place."""

    rank, step, place = -1, -1, ""

    def predicted(self, *args: Any) -> Any:
        here = torch.distributed.get_rank() == self.rank and len(self.seen) == self.step
        prompt = {"first branch": 4, "branch 1": 7, "last branch": 5}.get(self.place)
        self.transformer.fails_on = prompt if here else None
        self.scheduler.fails_in = None
        if here and self.place == "scheduler":
            self.scheduler.fails_in = self.scheduler.steps
        self.fails_here = here and self.place in ("combination", "between", "grad")
        found = super().predicted(*args)
        if self.fails_here and self.place == "between":
            msg = "out of toys"
            raise ZeroDivisionError(msg)
        return found

    def combine_multi_branch_cfg_noise(self, *args: Any, **options: Any) -> Any:
        if self.fails_here and self.place == "combination":
            msg = "out of toys"
            raise ZeroDivisionError(msg)
        return super().combine_multi_branch_cfg_noise(*args, **options)

    def predict_noise(self, **kwargs: Any) -> Any:
        found = super().predict_noise(**kwargs)
        if self.fails_here and self.place == "grad":
            return seeded(2, 2).requires_grad_()
        return found


class FailingEnds(Failing, Ends):
    """Stages in the middle get no latents, and hear of errors all the same."""


def fail(kind: type[Failing], rank: int, step: int, place: str) -> Any:
    """A request that fails, twice, and one that does not."""
    pipeline = kind(Transformer())
    found: list[Any] = []
    for bad in (True, True, False):
        pipeline.seen.clear()
        pipeline.rank, pipeline.step, pipeline.place = (rank if bad else -1), step, place
        found.append(text_of(lambda: found.append(pipeline.diffuse((4, 7, 5)))))
    errors, good = [one for one in found if isinstance(one, str)], found[-2]
    return errors, good["latents"]


def check(results: Any, rank: int, own: str, others: Any, *, middle: bool = True) -> None:
    expected = alone((4, 7, 5))["latents"]
    for me, (errors, latents) in enumerate(results):
        assert errors == [*[own if me == rank else others(me)] * 2, "none"]
        if middle or me != 1:
            assert torch.equal(latents, expected)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("place", ["first branch", "last branch"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_prediction_that_fails(ranks: Any, rank: int, place: str, step: int) -> None:
    results = ranks.run(in_stages, 3, 1, fail, Failing, rank, step, place, world_size=3, timeout=30)
    check(results, rank, OWN, lambda me: f"ParallelError: stage {rank} failed: {OWN}")


@pytest.mark.parametrize("place", ["scheduler", "combination", "between"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_last_stage_fails_elsewhere(ranks: Any, place: str, step: int) -> None:
    own = "LookupError: out of steps" if place == "scheduler" else OWN
    results = ranks.run(in_stages, 3, 1, fail, Failing, 2, step, place, world_size=3, timeout=30)
    check(results, 2, own, lambda me: f"ParallelError: stage 2 failed: {own}")


@pytest.mark.parametrize(("rank", "place"), [(0, "first branch"), (2, "scheduler")])
def test_stages_without_latents_hear_of_it(ranks: Any, rank: int, place: str) -> None:
    own = "LookupError: out of steps" if place == "scheduler" else OWN
    results = ranks.run(
        in_stages, 3, 1, fail, FailingEnds, rank, 1, place, world_size=3, timeout=30
    )
    text = f"ParallelError: stage {rank} failed: {own}"
    check(results, rank, own, lambda me: text, middle=False)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(("rank", "place"), [(0, "last branch"), (1, "first branch")])
@pytest.mark.parametrize("column", [0, 1])
def test_a_branch_of_another_column_fails(
    ranks: Any, column: int, rank: int, place: str, step: int
) -> None:
    """Ranks of two stages in two columns; the first has the branches 0 and 2, the other 1."""
    place = place if column == 0 else "branch 1"
    failing = rank + 2 * column
    results = ranks.run(
        in_stages, 2, 2, fail, Failing, failing, step, place, world_size=4, timeout=30
    )
    within = f"ParallelError: stage {rank} failed: {OWN}"
    told = OWN if rank == 1 else within
    last = f"ParallelError: in column {column} of the guidance group: {told}"

    def others(me: int) -> str:
        if me // 2 == column:
            return within
        return last if me % 2 == 1 else f"ParallelError: stage 1 failed: {last}"

    check(results, failing, OWN, others)


def test_gradients_are_refused(ranks: Any) -> None:
    results = ranks.run(in_stages, 2, 1, fail, Failing, 0, 0, "grad", timeout=30)
    for errors, _ in results:
        assert "asks for gradients; run the pipeline under torch.no_grad()" in errors[0]
        assert errors[2] == "none"


class Drifting(Transformer):
    """What flows changes by more than content."""

    drift = ""

    def packed(self, hidden: Any, text: Any) -> Any:
        found = super().packed(hidden, text)
        if self.drift == "value":
            return found | {"more": found["more"] | {"kind": "other"}}
        if self.drift == "shape":
            return found | {"hidden": hidden[:, :2]}
        return found | {"none": {1, 2}} if self.drift == "kind" else found


def drift(kind: str, unsteady: bool) -> list[str]:
    pipeline = Staged(Drifting())
    found = []
    for one in ("", kind, "") if unsteady else (kind,):
        pipeline.transformer.drift = one
        found.append(text_of(pipeline.diffuse))
    return found


@pytest.mark.parametrize("kind", ["value", "shape"])
def test_a_flow_that_changes_more_than_its_content_is_refused(ranks: Any, kind: str) -> None:
    for first, error, last in ranks.run(in_stages, 2, 1, drift, kind, True, timeout=30):
        assert (first, last) == ("none", "none")
        assert "for inputs of the same shapes a stage gave" in error


def test_a_flow_that_does_not_travel_is_refused(ranks: Any) -> None:
    for (error,) in ranks.run(in_stages, 2, 1, drift, "kind", False, timeout=30):
        assert "a set, which does not travel between ranks" in error


def no_branches() -> list[str]:
    pipeline = Staged()
    branch = {"hidden_states": seeded(1, 6, 8), "text": seeded(1, 4, 8)}
    return [
        text_of(lambda: pipeline.predict_noise_maybe_with_cfg(True, 3.0, branch, None)),
        text_of(lambda: pipeline.predict_noise_with_multi_branch_cfg(True, 3.0, [])),
    ]


def test_guidance_without_branches_is_refused(ranks: Any) -> None:
    for one, other in ranks.run(in_stages, 2, 1, no_branches, timeout=30):
        assert one == (
            "ParallelError: guidance needs the inputs of a negative branch; pass negative_kwargs"
        )
        assert other.startswith("ParallelError: guidance of no branch")


class ToAll(Staged):
    """A loop of its own, without the protection of `diffuse`."""

    def plain(self) -> Any:
        latents = seeded(1, 6, 8, seed=6)
        for index, t in enumerate(torch.linspace(1.0, 0.2, 3)):
            last = get_parallel_state().pp.rank_in_group == 1
            self.scheduler.fails_in = self.scheduler.steps if last and index else None
            found = self.predicted(latents, self.prompts((4, 7)), t, {})
            latents = self.scheduler_step_maybe_with_cfg(found, t, latents, True)
        return resolve(latents)


def outside() -> Any:
    pipeline = ToAll()
    error = text_of(pipeline.plain)
    pipeline.scheduler.fails_in = None
    return error, pipeline.diffuse()["latents"]


def test_predictions_outside_of_the_loop_tell_errors_too(ranks: Any) -> None:
    for found, latents in ranks.run(in_stages, 2, 1, outside, timeout=30):
        assert "LookupError: out of steps" in found
        assert torch.equal(latents, alone((4, 7))["latents"])


def fail_in_call(rank: int, call: int) -> list[str]:
    pipeline, found = TwoAtOnce(), []
    for bad in (True, True, False):
        pipeline.transformer.calls.clear()
        here = bad and get_parallel_state().pp.rank_in_group == rank
        pipeline.transformer.fails_in_call = call if here else None
        found.append(text_of(pipeline.diffuse))
    return found


@pytest.mark.parametrize("call", [0, 3, 4, 9])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_first_or_second_prediction_of_a_step_or_the_last_of_all_fails(
    ranks: Any, rank: int, call: int
) -> None:
    results = ranks.run(in_stages, 3, 1, fail_in_call, rank, call, world_size=3, timeout=30)
    for me, found in enumerate(results):
        error = OWN if me == rank else f"ParallelError: stage {rank} failed: {OWN}"
        assert found == [error, error, "none"]


def fail_in_second_step() -> list[str]:
    pipeline, found = TwoAtOnce(), []
    for bad in (True, True, False):
        pipeline.scheduler.steps = 0
        pipeline.scheduler.fails_in = 1 if bad else None
        found.append(text_of(pipeline.diffuse))
    return found


def test_a_second_step_of_one_prediction_fails(ranks: Any) -> None:
    results = ranks.run(in_stages, 3, 1, fail_in_second_step, world_size=3, timeout=30)
    for me, found in enumerate(results):
        own = "LookupError: out of steps"
        error = own if me == 2 else f"ParallelError: stage 2 failed: {own}"
        assert found == [error, error, "none"]


class Interrupted(Staged):
    """Its loop raises on every rank at the same place: before or after the scheduler's step."""

    place = ""

    def scheduler_step_maybe_with_cfg(self, *args: Any, **options: Any) -> Any:
        if self.place == "before":
            raise InterruptedError
        found = super().scheduler_step_maybe_with_cfg(*args, **options)
        if self.place == "after":
            raise InterruptedError
        return found


def interrupted(place: str) -> Any:
    pipeline, errors = Interrupted(), []
    for one in (place, place):
        pipeline.place = one
        errors.append(text_of(pipeline.diffuse))
    pipeline.place = ""
    return errors, pipeline.diffuse()["latents"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_loop_that_is_broken_off_on_every_rank_leaves_nothing(ranks: Any, place: str) -> None:
    results = ranks.run(in_stages, 3, 1, interrupted, place, world_size=3, timeout=30)
    for errors, latents in results:
        assert errors == ["InterruptedError: "] * 2
        assert torch.equal(latents, alone((4, 7))["latents"])
