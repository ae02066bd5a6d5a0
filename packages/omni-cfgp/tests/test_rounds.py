"""Pipelines that call their denoiser for each branch give what one process gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_denoisers import WIDTH, Cached, Pipeline, Toy, close, divide, prompts_of, state_of
from toy_results import Output, seeded

from omni_cfgp import CFGParallelConfig, apply_cfg_parallel, guided_by_stages
from omni_group_coordinator import record_traffic
from omni_parallel_state import ParallelLayout, ParallelState

LATENTS = seeded(1, 6, WIDTH, seed=5)


class Branches(Pipeline):
    """What it does between the calls is up to the test."""

    def __init__(self, transformer: Any, combined: Any) -> None:
        super().__init__(transformer)
        self.own = combined

    def combined(self, latents: Tensor, prompts: Any, t: Tensor, scale: float) -> Any:
        return self.own(self, latents, prompts, t)


def compare(make: Any, world: int, count: int = 3, **options: Any) -> tuple[int, list[int]]:
    """Two requests with guidance over ranks; how often this rank computed, and gathered."""
    prompts = prompts_of(count, [3 + 2 * i for i in range(count)])
    with torch.no_grad():
        expected = make()(prompts, latents=LATENTS, **options).sample
    pipeline = make()
    with divide(pipeline, world):
        gathers = []
        for _ in range(2):
            denoiser = pipeline.transformer
            if isinstance(denoiser, Cached):
                denoiser.kept.clear()
            pipeline.memory.clear()
            denoiser.calls = 0
            with record_traffic() as traffic:
                found = pipeline(prompts, latents=LATENTS, **options).sample
            gathers.append(traffic.calls["all_gather"])
            assert type(found) is Tensor
            close(found, expected)
        return denoiser.calls, gathers


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_branches_on_any_number_of_ranks(ranks: Any, count: int, world: int) -> None:
    """Each is computed once, and a step is one collective."""
    results = ranks.run(compare, lambda: Pipeline(Toy()), world, count, world_size=world)
    assert sum(calls for calls, _ in results) == 3 * count
    assert max(calls for calls, _ in results) <= 3 * max(2, -(-count // world))
    assert [gathers for _, gathers in results] == [[3, 3]] * world
    if 1 < count <= world:
        assert all(calls <= 3 for calls, _ in results)


def test_guidance_may_be_off_at_some_steps(ranks: Any) -> None:
    for unguided in ([0], [1, 3], [4]):
        options = {"steps": 5, "unguided": unguided}
        results = ranks.run(compare, lambda: Pipeline(Toy()), 2, 2, **options)
        assert [calls for calls, _ in results] == [5, 5 - len(unguided)]


def test_a_branch_stays_with_its_rank(ranks: Any) -> None:
    """Where a denoiser keeps something of each branch from step to step."""
    for unguided in ([], [1, 2]):
        for world in (2, 3):
            options = {"steps": 5, "unguided": unguided, "world_size": world}
            ranks.run(compare, lambda: Pipeline(Cached()), world, 3, **options)


# -- what happens between the calls ------------------------------------------------------------


def toggled(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    """A flag of the module, as of branches with skipped layers."""
    found = []
    for index, prompt in enumerate(prompts):
        pipeline.transformer.flag = 1.0 + 0.5 * index
        found.append(pipeline.transformer(latents, prompt, t[None])[0])
    pipeline.transformer.flag = 1.0
    return guided_by_stages(found, [2.0] * (len(found) - 1))


def changed_dict(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    """One dict for all calls, changed between them; and inputs changed in place."""
    options: dict[str, Any] = {}
    latents = latents.clone()
    found = []
    for index, prompt in enumerate(prompts):
        options["scale"] = 1.0 + 0.5 * index
        latents += 0.1
        found.append(pipeline.transformer(latents, prompt, t[None], options)[0])
    options.clear()
    return guided_by_stages(found, [2.0] * (len(found) - 1))


def in_arithmetic(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    """As pipelines do with one prediction before they ask for the next."""
    predict = pipeline.transformer
    first = predict(latents, prompts[0], t[None])[0].to(torch.float64)[:, :4].float()
    second = -predict(latents, prompts[1], t[None])[0][:, :4]
    third = latents[:, :4] - torch.cat([predict(latents, prompts[2], t[None])[0]], 1)[:, :4]
    third = torch.where(latents[:, :4] > 0, third, 2 * third)
    return torch.cat([(first + 2.0 * (second - third)), latents[:, 4:] * 0.1], dim=1)


def never_used(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    one = pipeline.transformer(latents, prompts[0], t[None])[0]
    pipeline.transformer(latents * 2, prompts[1], t[None])
    unused = pipeline.transformer(latents * 3, prompts[2], t[None])[0]
    other = pipeline.transformer(latents, prompts[2], t[None])[0]
    del unused
    return one - other


def kept(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    """Predictions, and what waits for them, of the step before, as momentum has them."""
    one, other = (pipeline.transformer(latents, p, t[None])[0] for p in prompts[:2])
    old = pipeline.memory.get("double", latents)
    pipeline.memory["double"] = 2 * other
    pipeline.memory["one"] = one
    return one - 0.1 * old + 0.1 * pipeline.memory["double"]


def one_by_one(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
    """Each is needed before the next is asked for."""
    found = latents * 0
    for prompt in prompts:
        found += pipeline.transformer(latents + 0.1 * found, prompt, t[None])[0]
    return found


BETWEEN = [toggled, changed_dict, in_arithmetic, never_used, kept, one_by_one]


@pytest.mark.parametrize("combined", BETWEEN)
def test_calls_are_made_with_what_there_is_at_that_moment(ranks: Any, combined: Any) -> None:
    for world in (2, 3):
        ranks.run(compare, lambda: Branches(Toy(), combined), world, world_size=world)


def with_outputs(wrap: Any) -> Any:
    def combined(pipeline: Any, latents: Tensor, prompts: Any, t: Tensor) -> Any:
        found = [pipeline.transformer(latents, p, t[None]) for p in prompts]
        if wrap is Output:
            return found[0].sample - found[1].sample
        if wrap is two:
            (one, _), (other, half) = found[:2]
            return one - other + half.float()
        return found[0] - found[1]

    return lambda: Branches(Toy(wrap), combined)


def two(sample: Tensor) -> Any:
    return sample, sample.half()


@pytest.mark.parametrize("wrap", [lambda sample: sample, Output, two])
def test_outputs_may_be_of_any_kind(ranks: Any, wrap: Any) -> None:
    for _, gathers in ranks.run(compare, with_outputs(wrap), 2):
        assert gathers == [3, 3]


class Raw(Pipeline):
    """Gives predictions back as they are."""

    @torch.no_grad()
    def __call__(self, wrap: Any) -> Any:
        return wrap(self.transformer(LATENTS, prompts_of(1)[0])[0][:, :2])


def raw() -> list[Any]:
    pipeline = Raw(Toy())
    with divide(pipeline, 2):
        found = [
            pipeline(lambda p: p),
            pipeline(lambda p: (p, 1))[0],
            pipeline(lambda p: {"a": [p]})["a"][0],
            pipeline(Output).sample,
        ]
    assert all(type(one) is Tensor for one in found)
    return found


def test_a_pipeline_gives_real_tensors(ranks: Any) -> None:
    for found in ranks.run(raw):
        for one in found:
            close(one, Toy()(LATENTS, prompts_of(1)[0])[0][:, :2])


# -- several at once ---------------------------------------------------------------------------


def two_states() -> None:
    wide, narrow = state_of(4), ParallelState(ParallelLayout(cfg=2, dp=2))
    prompts = prompts_of(3)
    one, other = Pipeline(Toy()), Branches(Toy(), toggled)
    expected = [pipeline(prompts, latents=LATENTS).sample for pipeline in (one, other)]
    first = apply_cfg_parallel(one, state=wide)
    apply_cfg_parallel(other, CFGParallelConfig("branches"), state=narrow)
    for _ in range(2):
        close(one(prompts, latents=LATENTS).sample, expected[0])
        close(other(prompts, latents=LATENTS).sample, expected[1])
    inputs = (LATENTS, prompts[0])
    difference = one.transformer(*inputs)[0] - 0.5 * other.transformer(*inputs)[0]
    close(difference, Toy()(*inputs)[0] * 0.5)
    first.remove()
    close(other(prompts, latents=LATENTS).sample, expected[1])


def test_two_pipelines_with_two_states_live_in_one_process(ranks: Any) -> None:
    ranks.run(two_states, world_size=4)
