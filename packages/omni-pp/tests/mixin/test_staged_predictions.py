"""`PipelineParallelMixin`: every rank ends with the latents that one process computes."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_staged_pipelines import (
    WIDTH,
    Alone,
    Ends,
    Loop,
    Staged,
    Transformer,
    alone,
    in_stages,
    real,
    seeded,
    state_of,
)

from omni_cfgp import CFGParallelMixin
from omni_parallel_state import ParallelLayout, ParallelState
from omni_parallel_state.denoising.waiting import arrived
from omni_pp.pipeline_parallel import AsyncLatents, PipelineParallelMixin


def requests(pp: int, cfg: int, lengths: Any, flow: str, outputs: int, options: Any) -> Any:
    """Two requests, the second of other shapes, then the first again."""
    with state_of(pp, cfg).use():
        pipeline = Staged(Transformer(flow, outputs))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [pipeline.diffuse(lengths, n, **options) for n in (6, 9, 6)]
            gc.collect()
        return found, pipeline.transformer.calls


CASES = [
    (2, 1, (4,), "dict", 1, {}),
    (2, 1, (4, 7), "dict", 1, {}),
    (2, 1, (4, 4, 4), "tensor", 1, {}),
    (3, 1, (4, 7), "tuple", 1, {}),
    (3, 1, (4, 7, 5), "dict", 2, {"cfg_normalize": True}),
    (3, 1, (4, 4), "tensor", 2, {}),
    (2, 2, (4,), "tuple", 1, {}),
    (2, 2, (4, 7), "dict", 1, {"cfg_normalize": False}),
    (2, 2, (4, 7, 5), "dict", 2, {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case[:5])))
def test_every_rank_gets_the_latents_of_one_process(ranks: Any, case: Any) -> None:
    pp, cfg, lengths, flow, outputs, options = case
    expected = [alone(lengths, Transformer(flow, outputs), tokens=n, **options) for n in (6, 9, 6)]
    for found, calls in ranks.run(requests, *case, world_size=pp * cfg):
        for one, wanted in zip(found, expected, strict=True):
            assert type(one["latents"]) is Tensor
            assert torch.equal(one["latents"], wanted["latents"])
            assert torch.equal(one["half"][0], wanted["half"][0])
        if cfg == 1:
            assert len(calls) == 9 * len(lengths)


class OnePrediction(Staged):
    def diffuse(self, count: int) -> Any:  # type: ignore[override]
        """One prediction, of which some tokens are kept."""
        prompts = self.prompts((4, 7, 5)[:count])
        options = {"output_slice": 2}
        return self.predicted(seeded(1, 6, WIDTH), prompts, torch.tensor(0.5), options)


class OnePredictionAlone(Loop, CFGParallelMixin):
    diffuse = OnePrediction.diffuse.__wrapped__  # type: ignore[attr-defined]


def one_prediction(outputs: int, count: int) -> Any:
    return OnePrediction(Transformer(outputs=outputs)).diffuse(count)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("pp", "cfg"), [(2, 1), (3, 1), (2, 2)])
def test_predictions_are_on_the_last_stage_sliced(
    ranks: Any, pp: int, cfg: int, outputs: int, count: int
) -> None:
    with ParallelState(ParallelLayout()).use():
        expected = OnePredictionAlone(Transformer(outputs=outputs)).diffuse(count)
    results = ranks.run(in_stages, pp, cfg, one_prediction, outputs, count, world_size=pp * cfg)
    for rank, found in enumerate(results):
        if rank % pp < pp - 1:
            assert found is None
        elif outputs == 1:
            assert found.shape == (1, 2, WIDTH)
            assert torch.equal(found, expected)
        else:
            assert type(found) is tuple
            assert found[1].dtype == torch.float64
            assert all(map(torch.equal, found, expected))


def with_generator(pp: int, cfg: int) -> Any:
    with state_of(pp, cfg).use():
        pipeline = Staged()
        generator = torch.Generator().manual_seed(3)
        return pipeline.diffuse(generator=generator)["latents"], pipeline.scheduler.steps


@pytest.mark.parametrize(("pp", "cfg"), [(2, 1), (3, 1), (2, 2)])
def test_the_generator_reaches_the_scheduler(ranks: Any, pp: int, cfg: int) -> None:
    expected = alone((4, 7), generator=torch.Generator().manual_seed(3))["latents"]
    assert not torch.equal(expected, alone((4, 7))["latents"])
    for rank, (found, steps) in enumerate(ranks.run(with_generator, pp, cfg, world_size=pp * cfg)):
        assert torch.equal(found, expected)
        assert steps == (3 if rank % pp == pp - 1 else 0)


class OwnScheduler(Staged):
    """Hands its scheduler over, as pipelines of several requests do."""

    def scheduler_step_maybe_with_cfg(self, *args: Any, **options: Any) -> Any:
        scheduler, self.scheduler = self.scheduler, None
        try:
            return super().scheduler_step_maybe_with_cfg(
                *args, per_request_scheduler=scheduler, **options
            )
        finally:
            self.scheduler = scheduler


def own_scheduler() -> Any:
    return OwnScheduler().diffuse()["latents"]


def test_a_scheduler_of_the_request_may_be_passed(ranks: Any) -> None:
    for found in ranks.run(in_stages, 2, 1, own_scheduler):
        assert torch.equal(found, alone((4, 7))["latents"])


# -- who gets the latents ----------------------------------------------------------------------


def latents_in_the_loop(kind: type[Staged]) -> Any:
    """The type of the latents after each step, and what came of them."""
    pipeline = kind()
    pipeline.diffuse()
    types = [type(latents).__name__ for latents in pipeline.seen]
    return types, [real(latents) for latents in pipeline.seen]


def test_all_stages_get_the_latents_of_every_step(ranks: Any) -> None:
    expected = Alone()
    with ParallelState(ParallelLayout()).use():
        expected.diffuse()
    for rank, (types, values) in enumerate(
        ranks.run(in_stages, 3, 1, latents_in_the_loop, Staged, world_size=3)
    ):
        assert types == ["Tensor" if rank == 2 else "AsyncLatents"] * 3
        assert all(map(torch.equal, values, expected.seen))


def test_stages_in_the_middle_may_keep_theirs(ranks: Any) -> None:
    expected = alone((4, 7))["latents"]
    results = ranks.run(in_stages, 3, 1, latents_in_the_loop, Ends, world_size=3)
    assert results[1][0] == ["Tensor"] * 3
    assert torch.equal(results[1][1][-1], seeded(1, 6, WIDTH, seed=6))
    for rank in (0, 2):
        assert torch.equal(results[rank][1][-1], expected)


class Unhurried(Staged):
    """Looks at what it got after a step, before anything needs it."""

    looks: list[Any]

    def scheduler_step_maybe_with_cfg(self, *args: Any, **options: Any) -> Any:
        found = super().scheduler_step_maybe_with_cfg(*args, **options)
        if isinstance(found, AsyncLatents):
            known = found.shape, found.dtype, found.device  # the first time this waits
            self.looks.append((arrived(found), *known))
        return found


def looks() -> Any:
    pipeline = Unhurried()
    pipeline.looks = []
    pipeline.diffuse(steps=4)
    return pipeline.looks


def test_shapes_are_known_before_the_latents_are_here(ranks: Any) -> None:
    found = ranks.run(in_stages, 2, 1, looks)[0]
    shape = (1, 6, WIDTH)
    first = found[0]
    assert first[1:] == (shape, torch.float32, torch.device("cpu"))
    assert found[1:] == [(False, *first[1:])] * 3


class Changing(Staged):
    """Changes its latents in place, on every rank alike."""

    def scheduler_step_maybe_with_cfg(self, *args: Any, **options: Any) -> Any:
        found = super().scheduler_step_maybe_with_cfg(*args, **options)
        found *= 0.5
        return found


def changing() -> Any:
    return Changing().diffuse()["latents"]


def changed_alone() -> Tensor:
    pipeline = Alone()
    step = pipeline.scheduler_step_maybe_with_cfg
    pipeline.scheduler_step_maybe_with_cfg = lambda *args, **options: (  # type: ignore[method-assign]
        step(*args, **options) * 0.5
    )
    with ParallelState(ParallelLayout()).use():
        found: Tensor = pipeline.diffuse()["latents"]
    return found


def test_latents_may_be_changed_in_place(ranks: Any) -> None:
    for found in ranks.run(in_stages, 3, 1, changing, world_size=3):
        assert torch.equal(found, changed_alone())


# -- one stage ---------------------------------------------------------------------------------


def test_one_stage_is_as_without_the_mixin() -> None:
    class Plain(PipelineParallelMixin, Loop, CFGParallelMixin):
        def combine_cfg_noise(self, *args: Any, **more: Any) -> Any:
            self.combined = more
            return super().combine_cfg_noise(*args)

    with ParallelState(ParallelLayout()).use():
        pipeline = Plain()
        for lengths in ((4,), (4, 7), (4, 7, 5)):
            found = pipeline.diffuse(lengths)["latents"]
            assert torch.equal(found, alone(lengths)["latents"])
        pipeline.diffuse(kwargs={"a": 1})
        assert pipeline.combined == {"kwargs": {"a": 1}}


class Kwargs(Staged):
    def combine_cfg_noise(self, *args: Any, **more: Any) -> Any:
        self.combined = more
        return super().combine_cfg_noise(*args)


def kwargs() -> Any:
    pipeline = Kwargs()
    pipeline.combined = None
    pipeline.diffuse(kwargs={"a": 1})
    return pipeline.combined


def test_kwargs_reach_the_combination(ranks: Any) -> None:
    assert ranks.run(in_stages, 2, 1, kwargs) == [None, {"kwargs": {"a": 1}}]
