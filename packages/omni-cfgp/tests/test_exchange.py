"""What one rank computes arrives on all, in one collective; so does an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_denoisers import state_of
from toy_results import Output, same, seeded

from omni_cfgp.exchange import BranchExchange, Work
from omni_cfgp.failure_marks import MARK_BYTES, FailureMarks, marked
from omni_cfgp.outcome import Outcome
from omni_group_coordinator import ParallelError, RankMismatchError, record_traffic

VALUES: list[Any] = [
    seeded(2, 3, 4),
    (seeded(5, 1),),
    (seeded(7).half(), seeded(3, 2).double(), seeded(2, 2).bfloat16()),
    Output(seeded(4, 4).T),
    {"mask": seeded(9) > 0, "ids": torch.arange(5), "kind": "x", "none": None, "list": [1.5]},
    seeded(6, 4)[::2, ::2],
    (seeded(3).to(torch.complex64), seeded(), torch.arange(250, 255, dtype=torch.uint8)),
    seeded(20)[::2],
    [],
    seeded(0, 3),
    seeded(1),
]


def works_of(count: int, world: int) -> list[Work]:
    return [Work(i % world, i, f"work {i}") for i in range(count)]


def everything(world: int) -> list[Any]:
    exchange = BranchExchange(state_of(world).cfg)
    works = works_of(len(VALUES), world)
    me = exchange.group.rank_in_group
    mine = {i: Outcome(v) for i, v in enumerate(VALUES) if works[i].owner == me}
    found = []
    for _ in range(2):
        found += exchange.exchange(works, mine)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_outputs_of_every_kind_arrive_as_they_were(ranks: Any, world: int) -> None:
    for found in ranks.run(everything, world, world_size=world):
        for one, expected in zip(found, VALUES * 2, strict=True):
            same(one, expected)


def costs() -> list[Any]:
    """Of a step with one dtype and of one with several, after the first of their kind."""
    exchange = BranchExchange(state_of(2).cfg)
    me = exchange.group.rank_in_group
    seen = []
    for kind, outputs in enumerate(([seeded(6, 4), (seeded(5, 4), seeded(9))], VALUES[2:5])):
        works = [Work(i % 2, (kind, i), "work") for i in range(len(outputs))]
        mine = {i: Outcome(v) for i, v in enumerate(outputs) if works[i].owner == me}
        exchange.exchange(works, mine)
        with record_traffic() as traffic:
            exchange.exchange(works, mine)
        seen.append((dict(traffic.calls), traffic.total_bytes))
    return seen


def test_a_step_costs_one_collective_of_the_predictions_alone(ranks: Any) -> None:
    first, second = ranks.run(costs)
    once = {"all_gather": 1}
    halves = 7 * 2 + 6 * 8 + 4 * 2
    assert first == [(once, 6 * 4 * 4), (once, halves + 9 + 5 * 8)]
    assert second == [(once, (5 * 4 + 9) * 4), (once, 16 * 4)]


def changed() -> list[int]:
    exchange = BranchExchange(state_of(2).cfg)
    me = exchange.group.rank_in_group
    works = works_of(4, 2)
    mine = {i: Outcome((seeded(4, 4), seeded(3))) for i in (me, me + 2)}
    tensors = [tensor for pair in exchange.exchange(works, mine) for tensor in pair]
    tensors[0].mul_(2)
    return [tensor._version for tensor in tensors]


def test_a_change_of_one_result_in_place_is_none_of_another(ranks: Any) -> None:
    assert ranks.run(changed) == [[1, *[0] * 7]] * 2


# -- errors ------------------------------------------------------------------------------------


def errors_of(exchange: BranchExchange, works: list[Work], mine: dict[int, Outcome]) -> str:
    try:
        exchange.exchange(works, mine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def failures(world: int, failing: list[int], value: Any) -> list[str]:
    """An error in the first step, good steps, one in a later step, and a good one again."""
    exchange = BranchExchange(state_of(world).cfg)
    works = works_of(world, world)
    me = exchange.group.rank_in_group
    good, bad = Outcome(value), Outcome(error=ZeroDivisionError(f"out of {me}"))
    found = []
    for fails in (True, False, False, True, False, True):
        mine = {me: bad if fails and me in failing else good}
        found.append(errors_of(exchange, works, mine))
    return found


@pytest.mark.parametrize(("world", "failing"), [(2, [0]), (2, [1]), (2, [0, 1]), (3, [1, 2])])
@pytest.mark.parametrize("value", [seeded(3, 4), (seeded(5).half(), seeded(9) > 0), seeded(1)])
def test_an_error_of_one_rank_ends_the_step_on_all(
    ranks: Any, world: int, failing: list[int], value: Any
) -> None:
    for rank, found in enumerate(ranks.run(failures, world, failing, value, world_size=world)):
        first = failing[0]
        text = f"work {first} failed on rank {first}: ZeroDivisionError: out of {first}"
        error = f"ZeroDivisionError: out of {rank}" if rank in failing else f"ParallelError: {text}"
        assert found == [error, "none", "none", error, "none", error]


def other_results() -> list[str]:
    exchange = BranchExchange(state_of(2).cfg)
    works = works_of(2, 2)
    me = exchange.group.rank_in_group
    values = [seeded(4, 4), seeded(4, 5), seeded(4, 4), {1, 2}, seeded(4, 4), seeded(4, 4).half()]
    found = []
    for value in values:
        found.append(errors_of(exchange, works, {me: Outcome(value if me else seeded(4, 4))}))
    return found


def test_a_result_that_does_not_fit_is_an_error_on_all(ranks: Any) -> None:
    first, second = ranks.run(other_results)
    for found, start in ((first, "ParallelError: work 1 failed on rank 1: Para"), (second, "Para")):
        assert found[::2] == ["none"] * 3
        assert found[1].startswith(start)
        assert "returned float32 (4, 5) where it returned float32 (4, 4) for the same" in found[1]
        assert found[3].startswith(start)
        assert "returned a set, which does not travel" in found[3]
        assert found[5].startswith(start)
        assert "returned float16 (4, 4) where" in found[5]


def mismatches() -> list[str]:
    """Other keys, owners, numbers of works, and inputs, and then the same ones."""
    exchange = BranchExchange(state_of(2).cfg)
    me = exchange.group.rank_in_group
    steps: list[list[Work]] = [
        [Work(0, ("a", me), "one")],
        [Work(me, "b", "one")],
        works_of(1 + me, 2),
        [Work(0, "c", "the work", inputs=(2.0, 1.0 + me, 5.0))],
        [Work(0, "c", "the work", inputs=(2.0, 1.0, 5.0))],
    ]
    found = []
    for works in steps:
        mine = {i: Outcome(seeded(4, 4)) for i, w in enumerate(works) if w.owner == me}
        found.append(errors_of(exchange, works, mine))
    return found


def test_ranks_that_do_other_work_are_an_error_on_all(ranks: Any) -> None:
    first, second = ranks.run(mismatches)
    assert first == second
    name = RankMismatchError.__name__
    assert all(text.startswith(f"{name}: the ranks of one image do not") for text in first[:3])
    assert "rank 0: one on group rank 0 of ('a', 0)\n  rank 1: one on group rank 0" in first[0]
    assert first[3].startswith(f"{name}: the work has other inputs on group rank 1 than on group r")
    assert first[4] == "none"


# -- marks -------------------------------------------------------------------------------------

DTYPES = [torch.uint8, torch.float16, torch.float32, torch.float64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mark_is_found_where_it_was_put(dtype: torch.dtype) -> None:
    marks = FailureMarks()
    good = seeded(20).to(dtype)
    cpu = torch.device("cpu")
    mark = marked(MARK_BYTES // dtype.itemsize, dtype, cpu)
    for parts in ([good, mark, good[:0]], [mark, good, mark, good]):
        assert [part.dtype for part in parts] == [dtype] * len(parts)
        marks.note(parts)
        expected = [rank for rank, part in enumerate(parts) if part is mark]
        assert marks.failed_at_once() == expected
        assert marks.failed() == [], "told once"
    marks.note([good, good[:0]])
    assert marks.failed() == []
    marks.note([mark])
    marks.clear()
    assert marks.failed() == []


def test_a_result_with_gradients_is_an_error() -> None:
    tensor = seeded(2).requires_grad_()
    outcome = Outcome.of(lambda: Output(tensor * 2))
    assert isinstance(outcome.error, ParallelError)
    assert "asks for gradients; call it under torch.no_grad()" in str(outcome.error)
    assert Outcome.of(tensor.detach).error is None
