"""The scheduler's part of `CFGParallelMixin`, and the ranks' latents in its first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from toy_denoisers import WIDTH, Scheduler, Toy, close, prompts_of, state_of
from toy_results import seeded, text_of

from omni_cfgp import CFGParallelMixin
from omni_group_coordinator import record_traffic
from omni_parallel_state import ParallelLayout, ParallelState

NOISE, LATENTS = seeded(1, 4, 3), seeded(1, 4, 3, seed=1)


class Mixed(CFGParallelMixin):
    def __init__(self, scheduler: Any = None) -> None:
        self.scheduler = scheduler


class Broadcasting(Mixed):
    cfg_seeds = "broadcast"


def test_a_step_is_the_schedulers() -> None:
    pipeline = Mixed(Scheduler())
    expected = LATENTS - 0.3 * NOISE
    close(pipeline.scheduler_step(NOISE, 1.0, LATENTS), expected)
    other = Scheduler(noise=2.0)
    found = pipeline.scheduler_step(
        NOISE, 1.0, LATENTS, other, generator=torch.Generator().manual_seed(3)
    )
    close(found, expected + 2 * seeded(1, 4, 3, seed=3))
    with ParallelState(ParallelLayout()).use():
        step = pipeline.scheduler_step_maybe_with_cfg
        close(step(NOISE, 1.0, LATENTS, True), expected)
        more = {"generator": torch.Generator().manual_seed(3)}
        close(step(NOISE, 1.0, LATENTS, True, other, **more), found)


def test_the_generator_is_not_given_to_those_who_take_none() -> None:
    scheduler = SimpleNamespace(step=lambda noise, t, latents, return_dict: (noise + latents, t))
    close(Mixed(scheduler).scheduler_step(NOISE, 1.0, LATENTS), NOISE + LATENTS)


def errors() -> list[str]:
    class Without(CFGParallelMixin):
        pass

    found = []
    for pipeline, given in (
        (Without(), None),
        (Mixed(), None),
        (Mixed(object()), None),
        (Mixed(Scheduler()), SimpleNamespace(step=3)),
    ):
        args = (NOISE, 1.0, LATENTS)
        found.append(text_of(lambda p=pipeline, g=given, a=args: p.scheduler_step(*a, g)))
        step = pipeline.scheduler_step_maybe_with_cfg
        assert text_of(lambda s=step, g=given, a=args: s(*a, True, g)) == found[-1]
    return found


def test_no_scheduler_and_one_without_a_step_are_errors() -> None:
    with ParallelState(ParallelLayout()).use():
        check_errors(errors())


def check_errors(found: list[str]) -> None:
    assert found[0] == (
        "ValueError: Without has no scheduler; set one, or pass per_request_scheduler"
    )
    assert found[1].startswith("ValueError: Mixed has no scheduler")
    assert found[2] == "TypeError: the scheduler, a object, has no method step"
    assert found[3] == "TypeError: the scheduler, a SimpleNamespace, has no method step"


def errors_on_ranks() -> list[str]:
    with state_of(2).use():
        return errors()


def test_they_are_errors_on_several_ranks_as_well(ranks: Any) -> None:
    for found in ranks.run(errors_on_ranks):
        check_errors(found)


# -- the first step ----------------------------------------------------------------------------


def several(
    seeds: Literal["error", "broadcast"], kind: str, same: bool, world: int
) -> tuple[list[Any], list[int]]:
    """Two requests of three steps; the latents, or the error, and how often ranks talk."""
    state = state_of(world)
    pipeline = (Mixed if seeds == "error" else Broadcasting)(Scheduler())
    own = Scheduler()
    found: list[Any] = []
    talks = []
    with state.use():
        for request in range(2):
            scheduler = own if kind == "per request" else pipeline.scheduler
            scheduler.set_timesteps(3)
            seed = request + (0 if same else 10 * state.cfg.rank_in_group)
            latents: Any = seeded(1, 4, 3, seed=seed)
            for t in scheduler.timesteps:
                with record_traffic() as traffic:
                    try:
                        latents = pipeline.scheduler_step_maybe_with_cfg(
                            NOISE, t, latents, True, own if kind == "per request" else None
                        )
                    except Exception as error:
                        latents = f"{type(error).__name__}: {error}"
                        break
                    finally:
                        talks.append(traffic.total_calls)
            found.append(latents)
    return found, talks


def expected_of(request: int) -> Tensor:
    return seeded(1, 4, 3, seed=request) - 0.9 * NOISE


@pytest.mark.parametrize("kind", ["own", "per request"])
@pytest.mark.parametrize("seeds", ["error", "broadcast"])
def test_ranks_that_agree_compare_once_for_each_request(ranks: Any, seeds: str, kind: str) -> None:
    for found, talks in ranks.run(several, seeds, kind, True, 3, world_size=3):
        assert [bool(talk) for talk in talks] == [True, False, False] * 2
        for request, latents in enumerate(found):
            close(latents, expected_of(request))


def test_ranks_with_other_latents_go_on_with_those_of_the_first(ranks: Any) -> None:
    for found, talks in ranks.run(several, "broadcast", "own", False, 3, world_size=3):
        assert [bool(talk) for talk in talks] == [True, False, False] * 2
        for request, latents in enumerate(found):
            close(latents, expected_of(request))


def test_by_default_ranks_with_other_latents_are_an_error_on_all(ranks: Any) -> None:
    assert CFGParallelMixin.cfg_seeds == "error"
    text = (
        "RankMismatchError: the ranks of one image have different latents in the first step: seed "
        'their generators alike, or set cfg_seeds = "broadcast" to go on with those of the first'
    )
    for found, _ in ranks.run(several, "error", "own", False, 2, timeout=30):
        assert found == [text] * 2


def tuples_and_shapes() -> list[Any]:
    """Latents of video and sound, and latents that have other shapes on each rank."""
    state = state_of(2)
    me = state.cfg.rank_in_group

    class Pairs:
        def step(self, noise: Any, t: Any, latents: Any, return_dict: bool) -> Any:
            return (latents,)

    found = []
    with state.use(), torch.inference_mode():
        step = Broadcasting(Pairs()).scheduler_step_maybe_with_cfg
        found.append(step(NOISE, 1.0, (seeded(1, 4, 3, seed=me), seeded(2, seed=3 + me)), True))
        step = Broadcasting(Pairs()).scheduler_step_maybe_with_cfg
        found.append(text_of(lambda: step(NOISE, 1.0, seeded(1, 4 + me, 3), True)))
    return found


def test_latents_may_be_several_but_not_of_different_shapes(ranks: Any) -> None:
    for pair, error in ranks.run(tuples_and_shapes, timeout=30):
        close(pair[0], seeded(1, 4, 3))
        close(pair[1], seeded(2, seed=3))
        assert error.startswith("RankMismatchError: the ranks of one image have different latents")


class Loop(CFGParallelMixin):
    """Two guided steps from latents of its own."""

    cfg_seeds = "broadcast"

    def __init__(self) -> None:
        self.transformer = Toy()
        self.scheduler = Scheduler()

    def __call__(self, latents: Tensor) -> Tensor:
        self.scheduler.set_timesteps(2)
        for t in self.scheduler.timesteps:
            both = [{"hidden_states": latents, "encoder_hidden_states": p} for p in prompts_of(2)]
            noise = self.predict_noise_maybe_with_cfg(True, 3.0, *both)
            latents = self.scheduler_step_maybe_with_cfg(noise, t, latents, True)
        return latents


def broadcast_loop() -> tuple[Tensor, Tensor]:
    with torch.no_grad(), ParallelState(ParallelLayout(dp=2)).use():
        alone = Loop()(seeded(1, 4, WIDTH))
    state = state_of(2)
    with torch.no_grad(), state.use():
        return Loop()(seeded(1, 4, WIDTH, seed=state.rank)), alone


def test_predictions_too_are_of_the_latents_of_the_first(ranks: Any) -> None:
    for found, alone in ranks.run(broadcast_loop):
        close(found, alone)
