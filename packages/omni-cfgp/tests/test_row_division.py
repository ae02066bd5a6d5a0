"""The rows of one call over ranks, where they may be computed apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_denoisers import (
    WIDTH,
    Coupled,
    OfLists,
    Pipeline,
    Records,
    Toy,
    close,
    count_rows,
    divide,
    of_several_dtypes,
    prompts_of,
)
from toy_results import Output, same, seeded

from omni_group_coordinator import record_traffic
from omni_parallel_state.denoising.waiting import resolve, resolve_all

LATENTS = seeded(1, 6, WIDTH, seed=5)
ODD: dict[str, Any] = {
    "dataclass": Output,
    "several dtypes": of_several_dtypes,
    "a number beside": lambda sample: (sample, sample.sum()),
    "flags": lambda sample: (sample, sample.flatten(1).mean(1) > 0, (sample > 0).long()),
    "list": lambda sample: (list(sample),),
}


def compare(make: Any, world: int, count: int, **options: Any) -> tuple[list[int], list[str]]:
    prompts = prompts_of(count)
    expected = make()(prompts, latents=LATENTS).sample
    pipeline = make()
    with divide(pipeline, world, **options), Records() as records:
        rows = count_rows(pipeline.transformer)
        for _ in range(2):
            rows.clear()
            with record_traffic() as traffic:
                close(pipeline(prompts, latents=LATENTS).sample, expected)
            assert traffic.calls["all_gather"] <= 3
    return rows, records.texts


def batched(make: Any) -> Any:
    return lambda: Pipeline(make(), batched=True)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_rows_of_a_batch_are_divided(ranks: Any, count: int, world: int) -> None:
    results = ranks.run(compare, batched(Toy), world, count, world_size=world)
    rows = [rows for rows, _ in results]
    shares = [count // world + (rank < count % world) for rank in range(world)]
    assert rows == [[share] * 3 if share else [] for share in shares]
    texts = [texts for _, texts in results]
    assert all(len(found) == (2 if count == 1 else 0) for found in texts)


def test_rows_that_see_each_other_are_computed_together(ranks: Any) -> None:
    """Which is told once; what comes out is right."""
    for rank, (rows, texts) in enumerate(ranks.run(compare, batched(Coupled), 2, 2)):
        assert rows == ([] if rank else [2] * 3)
        assert texts[0] == (
            "the rows of calls of transformer depend on each other and stay together: each call "
            "is made on one rank"
        )
        assert [text for text in texts if "depend" in text] == texts[:1]


def test_how_work_is_divided_may_be_said(ranks: Any) -> None:
    for rank, (rows, _) in enumerate(ranks.run(compare, batched(Toy), 2, 2, division="branches")):
        assert rows == ([] if rank else [2] * 3)
    for rows, _ in ranks.run(compare, batched(Toy), 2, 2, division="rows"):
        assert rows == [1] * 3


# -- inputs and outputs ------------------------------------------------------------------------


def outputs(kind: str, world: int) -> None:
    toy = Toy(ODD[kind])
    prompt = torch.cat(prompts_of(3))
    inputs = [seeded(3, 6, WIDTH, seed=seed) for seed in range(3)]
    expected = [toy(latents, prompt) for latents in inputs]
    with divide(toy, world, division="rows"):
        for latents, wanted in zip(inputs, expected, strict=True):
            check(resolve_all(toy(latents, prompt)), wanted)


def check(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor) and expected.is_floating_point():
        assert found.dtype == expected.dtype
        close(found.float(), expected.float())
    elif isinstance(expected, Output):
        check(resolve(found.sample), expected.sample)
    elif isinstance(expected, tuple | list):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check(one, other)
    else:
        same(found, expected)


@pytest.mark.parametrize("kind", ODD)
def test_outputs_of_every_kind_are_joined(ranks: Any, kind: str) -> None:
    for world in (2, 3):
        ranks.run(outputs, kind, world, world_size=world)


def lists(lengths: list[int], world: int) -> None:
    toy = OfLists()
    texts = [seeded(3 + i, WIDTH, seed=9 + i) for i in range(len(lengths))]
    times = seeded(len(lengths))
    with torch.no_grad():
        for step in range(3):
            x = [seeded(length, WIDTH, seed=i + step) for i, length in enumerate(lengths)]
            expected = toy(x, times, cap_feats=texts)
            with divide(toy, world, division="rows"):
                for _ in range(2):
                    check(resolve_all(toy(x, times, cap_feats=texts)), expected)
                    found = resolve_all(toy(x[:2], times[:2], cap_feats=texts[:2]))
                    check(found[0], expected[0][:2])


@pytest.mark.parametrize("lengths", [[4, 4], [4, 7, 5], [4, 4, 4, 9, 9]])
def test_lists_of_samples_are_divided(ranks: Any, lengths: list[int]) -> None:
    for world in (2, 3):
        ranks.run(lists, lengths, world, world_size=world)


class Takes(Toy):
    """Takes things out of a dict that it is given, and has a table that all samples share."""

    def forward(self, hidden_states: Tensor, options: Any, rotary: Any, table: Any = None) -> Any:
        scale = options.pop("scale")
        inner = options["inner"].pop("shift")
        found = super().forward(hidden_states * rotary[0] + rotary[1])[0]
        if table is not None:
            found = found + table.sum(0)
        return (found * scale[:, None, None] + inner[:, None, None],)


def dicts(rows: int, world: int) -> None:
    toy = Takes()
    latents = seeded(rows, 6, WIDTH)
    # As many rows as the batch has, of which every sample needs all.
    tables = (seeded(rows, 1, WIDTH, seed=3).mean(0, keepdim=True), seeded(6, WIDTH, seed=4))
    table = seeded(rows, WIDTH, seed=6)

    def options() -> Any:
        return {"scale": seeded(rows, seed=1), "inner": {"shift": seeded(rows, seed=2)}}

    expected = toy(latents, options(), tables, table=table)[0]
    with divide(toy, world, division="rows", shared_inputs=("table",)):
        calls = count_rows(toy)
        for _ in range(3):
            close(toy(latents, options(), tables, table=table)[0] * 1, expected)
    assert calls[0] == rows
    assert max(calls[-2:]) < rows
    # Not said, it is found out.
    with divide(toy, world, division="rows"), Records() as records:
        for _ in range(3):
            close(toy(latents, options(), tables, table=table)[0] * 1, expected)
    assert len(records.texts) == 1


def test_what_a_call_takes_out_of_a_dict_is_there_for_the_next(ranks: Any) -> None:
    ranks.run(dicts, 2, 2)
    ranks.run(dicts, 3, 2)


class Rotated(Toy):
    def forward(self, hidden_states: Tensor, image_rotary_emb: Any) -> Any:
        cos, sin = image_rotary_emb
        assert cos.shape == (len(sin), WIDTH)
        return super().forward(hidden_states * cos + sin)


def rotary() -> list[int]:
    """Two tokens and two rows: the tables look like a part of the batch."""
    toy = Rotated()
    tables = (seeded(2, WIDTH, seed=1), seeded(2, WIDTH, seed=2))
    latents = seeded(2, 2, WIDTH)
    expected = toy(latents, image_rotary_emb=tables)[0]
    with divide(toy, 2, division="rows"):
        calls = count_rows(toy)
        for _ in range(3):
            close(toy(latents, image_rotary_emb=tables)[0] * 1, expected)
    return calls


def test_rotary_tables_stay_whole(ranks: Any) -> None:
    assert ranks.run(rotary) == [[2, 1, 1, 1]] * 2


class Flagged(Coupled):
    """Whose rows see each other or do not, as an argument says."""

    def forward(self, hidden_states: Tensor, coupled: Any = False, shift: Any = None) -> Any:
        shift = 0 if shift is None else shift.sum() * hidden_states.mean(0)
        if coupled:
            return super().forward(hidden_states + shift)
        return Toy.forward(self, hidden_states + shift)


def flagged() -> None:
    toy = Flagged()
    latents = seeded(4, 6, WIDTH)
    calls = [{}, {"coupled": True}, {"coupled": False}, {"shift": seeded(1)}, {"coupled": "yes"}]
    expected = [toy(latents, **options)[0] for options in calls]
    with divide(toy, 2, division="rows"):
        for _ in range(2):
            for options, wanted in zip(calls, expected, strict=True):
                close(toy(latents, **options)[0] * 1, wanted)


def test_what_an_argument_says_of_the_rows_counts(ranks: Any) -> None:
    ranks.run(flagged)


def alternating() -> None:
    """Verdicts are of kinds of calls: of those inputs, whatever their number of rows."""
    toy, coupled = Toy(), Coupled()
    for model in (toy, coupled):
        inputs = [(seeded(n, 6, WIDTH, seed=n), seeded(n, 4, WIDTH)) for n in (2, 4, 1, 3, 2, 5)]
        expected = [model(*pair)[0] for pair in inputs]
        with divide(model, 3, division="rows"):
            for pair, wanted in zip(inputs * 2, expected * 2, strict=True):
                close(model(*pair)[0] * 1, wanted)
                close(model(pair[0])[0] * 1, model(pair[0])[0] * 1)


def test_batches_may_alternate(ranks: Any) -> None:
    ranks.run(alternating, world_size=3)


# -- errors ------------------------------------------------------------------------------------


class Fails(Toy):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (hidden_states[:, 0, 0] > 50).any():
            msg = "out of toys"
            raise ZeroDivisionError(msg)
        return super().forward(hidden_states, *args, **kwargs)


def fail() -> list[str]:
    toy = Fails()
    good, bad = seeded(3, 6, WIDTH), seeded(3, 6, WIDTH)
    bad[2, 0, 0] = 99
    found = []
    with divide(toy, 2, division="rows"):
        for latents in (bad, good, good, bad, good, bad):
            try:
                close(toy(latents)[0] * 1, Toy()(latents)[0])
                found.append("none")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
    return found


def test_a_row_that_raises_ends_the_call_on_all_ranks(ranks: Any) -> None:
    first, second = ranks.run(fail, timeout=30)
    own = "ZeroDivisionError: out of toys"
    other = f"ParallelError: rows 2 to 2 of Fails failed on rank 1: {own}"
    assert first == [own, "none", "none", other, "none", other]
    assert second == [own, "none", "none", own, "none", own]
