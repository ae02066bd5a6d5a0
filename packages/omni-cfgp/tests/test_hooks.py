"""Guidance over ranks is put on a pipeline and taken off again."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from toy_denoisers import (
    WIDTH,
    Pipeline,
    Records,
    Toy,
    close,
    count_rows,
    divide,
    prompts_of,
    state_of,
)
from toy_results import seeded, text_of

from omni_cfgp import DENOISERS, CFGParallelConfig, apply_cfg_parallel, strategy
from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_parallel_state.denoising.waiting import is_deferred

LATENTS = seeded(1, 6, WIDTH, seed=5)


def image(pipeline: Any, **options: Any) -> Any:
    return pipeline(prompts_of(2), latents=LATENTS, **options).sample


def put_on_and_take_off() -> None:
    pipeline = Pipeline(Toy())
    expected = image(pipeline)
    objects = [pipeline, pipeline.transformer, pipeline.scheduler]
    before = [(type(one), dict(vars(one))) for one in objects]
    signature = inspect.signature(type(pipeline).__call__)
    handle = divide(pipeline, 2)
    assert all(type(one) is not cls for one, (cls, _) in zip(objects, before, strict=True))
    assert isinstance(pipeline, Pipeline)
    assert isinstance(pipeline.transformer, Toy)
    assert [type(one).__name__ for one in objects] == ["Pipeline", "Toy", "Scheduler"]
    assert inspect.signature(type(pipeline).__call__) == signature
    for again in (pipeline, pipeline.transformer):
        with pytest.raises(ParallelConfigError, match="divided over ranks already; call remove"):
            divide(again, 2)
    other = Pipeline(pipeline.transformer)
    with pytest.raises(ParallelConfigError, match="guidance of this Toy is divided"):
        divide(other, 2)
    assert type(other) is Pipeline
    close(image(pipeline), expected)
    handle.remove()
    handle.remove()
    assert handle.removed
    attributes = [(type(one), dict(vars(one))) for one in objects]
    for (cls, now), (old, was) in zip(attributes, before, strict=True):
        assert cls is old
        assert now.keys() == was.keys()
    assert torch.equal(image(pipeline), expected)
    with divide(pipeline, 2) as inner:
        assert not inner.removed
        assert type(pipeline) is not Pipeline
    assert type(pipeline) is Pipeline
    with pytest.raises(KeyError), divide(pipeline, 2):
        raise KeyError
    assert type(pipeline.transformer) is Toy
    with strategy.apply(pipeline, state_of(2)):
        close(image(pipeline), expected)
    assert type(pipeline) is Pipeline


def test_taking_off_gives_back_the_very_same_objects(ranks: Any) -> None:
    ranks.run(put_on_and_take_off)


def alone() -> None:
    toy = Toy()
    prompts = prompts_of(2)
    expected = [toy(LATENTS, prompt)[0] for prompt in prompts]
    with divide(toy, 2):
        toy.calls = 0
        one, other = (toy(LATENTS, prompt)[0] for prompt in prompts)
        assert is_deferred(one)
        assert toy.calls == 1
        assert torch.equal(one - other, expected[0] - expected[1])
        with pytest.raises(ParallelConfigError, match="divided over ranks already"):
            divide(Pipeline(toy), 2)
    assert torch.equal(toy(LATENTS, prompts[0])[0], expected[0])


def test_a_denoiser_without_a_pipeline(ranks: Any) -> None:
    ranks.run(alone)


def copies() -> None:
    pipeline = Pipeline(Toy())
    expected = image(pipeline)
    handle = divide(pipeline, 2)
    twin = copy.deepcopy(pipeline.transformer)
    assert torch.equal(twin(LATENTS)[0], Toy()(LATENTS)[0])
    assert twin.calls == pipeline.transformer.calls + 1
    lone = copy.deepcopy(pipeline)
    found = image(lone)  # computes all of its branches itself
    close(found, expected)
    assert lone.transformer.calls == pipeline.transformer.calls + 6
    handle.remove()
    close(image(lone), expected)
    divide(pipeline, 2)
    gone = [weakref.ref(pipeline), weakref.ref(pipeline.transformer)]
    del pipeline
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert not handle.remove()


def test_a_copy_is_not_divided_and_a_dropped_pipeline_is_freed(ranks: Any) -> None:
    ranks.run(copies)


# -- what is divided ---------------------------------------------------------------------------


class Two(Pipeline):
    """Of two denoisers, which share the steps, or of one within another."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(None)
        for name, module in modules.items():
            setattr(self, name, module)
        self.names = list(modules)
        self.step = 0

    def combined(self, latents: Any, prompts: Any, t: Any, scale: float) -> Any:
        self.transformer = getattr(self, self.names[self.step % 2])
        self.step += 1
        return super().combined(latents, prompts, t, scale)


def several() -> None:
    def make() -> Two:
        second = Toy()
        second.flag = -2.0
        return Two(prior=Toy(), my_model=second)

    expected = image(make(), steps=4)
    for names, calls in ((("prior", "my_model"), [4, 4]), (("my_model",), [8, 4]), ((), [4, 8])):
        pipeline = make()
        with divide(pipeline, 2, denoisers=names):
            close(image(pipeline, steps=4), expected)
        own = [pipeline.prior.calls, pipeline.my_model.calls]
        assert own == [one // 2 for one in calls]
    with pytest.raises(ParallelConfigError, match="has no module missing; its modules: my"):
        divide(make(), 2, denoisers=("prior", "missing"))


def test_denoisers_are_those_of_the_usual_names_or_those_that_are_named(ranks: Any) -> None:
    ranks.run(several)


class Outer(Toy):
    """Asks another denoiser before it predicts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.inner(hidden_states, *args)[0] + hidden_states, *args, **kwargs)


def nested(batched: bool) -> None:
    inner = Toy()
    pipeline = Pipeline(Outer(inner), batched=batched)
    pipeline.prior = inner  # type: ignore[attr-defined]
    prompts = prompts_of(3)
    expected = pipeline(prompts, latents=LATENTS).sample
    with divide(pipeline, 2), Records() as records:
        rows = count_rows(inner)
        for _ in range(2):
            rows.clear()
            close(pipeline(prompts, latents=LATENTS).sample, expected)
    assert records.texts == []
    assert sum(rows) in (3, 6)


@pytest.mark.parametrize("batched", [False, True])
def test_a_denoiser_within_another_is_a_part_of_it(ranks: Any, batched: bool) -> None:
    ranks.run(nested, batched, timeout=30)


def same_twice() -> None:
    toy = Toy()
    pipeline = Pipeline(toy, batched=True)
    pipeline.transformer_2 = toy  # type: ignore[attr-defined]
    expected = image(pipeline)
    with divide(pipeline, 2):
        for _ in range(2):
            close(image(pipeline), expected)
    assert type(toy) is Toy


def test_one_module_may_have_two_names(ranks: Any) -> None:
    ranks.run(same_twice, timeout=30)


def test_a_pipeline_without_a_denoiser_is_an_error() -> None:
    state = ParallelState(ParallelLayout())
    names = ", ".join(DENOISERS)
    with pytest.raises(ParallelConfigError, match=f"Pipeline has no module {names}; its modules: "):
        apply_cfg_parallel(Pipeline(None), state=state)
    with pytest.raises(ParallelConfigError, match=r"none\. Name those that predict noise in CFGPa"):
        apply_cfg_parallel(Pipeline(None), state=state)


def test_one_rank_changes_nothing_and_needs_no_process_group() -> None:
    pipeline = Pipeline(Toy())
    expected = image(pipeline)
    before = [dict(vars(one)) for one in (pipeline, pipeline.scheduler)]
    handle = divide(pipeline, 1)
    assert [type(one) for one in (pipeline, pipeline.transformer)] == [Pipeline, Toy]
    assert [dict(vars(one)) for one in (pipeline, pipeline.scheduler)] == before
    assert torch.equal(image(pipeline), expected)
    with pytest.raises(ParallelConfigError, match="divided over ranks already"):
        divide(pipeline, 1)
    handle.remove()
    with ParallelState(ParallelLayout()).use():
        apply_cfg_parallel(pipeline).remove()


def test_without_a_state_it_says_so() -> None:
    with pytest.raises(ParallelError, match="there is no parallel state"):
        apply_cfg_parallel(Pipeline(Toy()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"division": "columns"}, "division='columns'; legal: 'auto', 'branches', 'rows'"),
        ({"seeds": "mine"}, "seeds='mine'; legal: 'broadcast', 'error'"),
    ],
)
def test_values_that_are_not_legal_are_errors(options: Any, text: str) -> None:
    with pytest.raises(ParallelConfigError, match=text):
        CFGParallelConfig(**options)


# -- torch.compile -----------------------------------------------------------------------------


def compiled() -> None:
    prompts = prompts_of(2)
    expected = image(Pipeline(Toy()))
    inner = Toy()
    inner.compile(backend="eager")
    for denoiser in (torch.compile(Toy(), backend="eager"), inner):
        pipeline = Pipeline(denoiser)
        with divide(pipeline, 2):
            for _ in range(2):
                close(image(pipeline), expected)
        close(image(pipeline), expected)
    toy = Toy()

    def step(latents: Any) -> Any:
        return toy(latents, prompts[0])[0] * 2

    whole = torch.compile(step, backend="eager", fullgraph=True)
    with divide(toy, 2), pytest.raises(RuntimeError, match="compile the denoiser alone"):
        whole(LATENTS)
    torch.compiler.reset()
    wanted = step(LATENTS)
    parts = torch.compile(step, backend="eager")
    with divide(toy, 2):
        close(parts(LATENTS), wanted)


def test_a_compiled_denoiser_is_divided_and_a_compiled_loop_is_refused(ranks: Any) -> None:
    ranks.run(compiled)


def copied_while_applied() -> None:
    """Copies are of the original classes, and may be divided themselves."""
    pipeline = Pipeline(Toy())
    handle = divide(pipeline, 2)
    twin = copy.deepcopy(pipeline)
    assert type(twin) is Pipeline
    assert type(twin.transformer) is Toy
    made = type(pipeline.transformer)()
    saved = io.BytesIO()
    torch.save(pipeline.transformer, saved)
    saved.seek(0)
    assert type(torch.load(saved, weights_only=False)) is Toy
    handle.remove()
    expected = image(twin)
    for one in (twin, Pipeline(made)):
        with divide(one, 2):
            calls = count_rows(one.transformer)
            close(image(one), expected)
            assert len(calls) < 6
    assert type(made) is Toy


def test_a_copy_made_while_applied_is_an_ordinary_one(ranks: Any) -> None:
    ranks.run(copied_while_applied)


def replaced() -> list[str]:
    pipeline = Pipeline(Toy())
    found = []
    with divide(pipeline, 2):
        before = pipeline.transformer
        pipeline.transformer = Toy()
        found.append(text_of(lambda: image(pipeline)))
        pipeline.transformer = torch.compile(before, backend="eager")
        found.append(text_of(lambda: image(pipeline)))
        pipeline.transformer = before
        image(pipeline)
    return found


def test_a_denoiser_that_was_replaced_is_an_error(ranks: Any) -> None:
    for other, compiled in ranks.run(replaced):
        assert "transformer of the pipeline was replaced after apply_cfg_parallel" in other
        assert "remove the handle, replace it, apply again" in other
        assert "compile it before, or in place: pipeline.transformer.compile()" in compiled
