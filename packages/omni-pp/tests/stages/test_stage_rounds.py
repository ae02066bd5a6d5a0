"""Calls that move through stages give what one process gives, and are done by the right stage."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from toy_stages import ToyPipeline, ToyTransformer, alone, close, guided, request, stages

from omni_group_coordinator import record_traffic
from omni_pp.stages.stage_link import StageLink
from rank_harness import RankPool


@torch.no_grad()
def compare(world: int, make: Any, kind: dict[str, Any], options: dict[str, Any]) -> list[int]:
    """A request twice on stages, and one of another length between; calls of each block."""
    pipeline = ToyPipeline(make())
    with stages(pipeline, world, **options) as handle:
        blocks = dict(pipeline.transformer.blocks._modules)
        for seed, length in ((0, 7), (1, 5), (0, 7)):
            found = pipeline(**guided(seed, length=length, **kind)).sample
            expected = alone(guided(seed, length=length, **kind), ToyPipeline(make()))
            close(found, expected)
        assert len(handle.partitions) == 1
        held = [int(name) for name in blocks]
        assert all(block.calls for block in blocks.values())
    assert len(pipeline.transformer.blocks) == 6
    return held


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize(("world", "virtual"), [(2, 1), (3, 1), (4, 1), (2, 2), (2, 3), (3, 2)])
def test_any_number_of_stages(ranks: RankPool, world: int, virtual: int, doubled: bool) -> None:
    options = {"virtual_stages": virtual}
    kind = {"doubled": doubled, "rows": 2 if doubled else 1}
    held = ranks.run(compare, world, ToyTransformer, kind, options, world_size=world)
    assert sorted(index for one in held for index in one) == list(range(6))
    if virtual > 1:
        chunk = 6 // (world * virtual)
        assert held[0][: 2 * chunk : chunk] == [0, world * chunk]


@torch.no_grad()
def receives_and_runs() -> list[str]:
    """What the second stage does, in order: starts to receive a piece, and runs its first block."""
    pipeline, seen, expect = ToyPipeline(), [], StageLink.expect

    def noting(link: StageLink, stream: str, src: int, *, reuse: bool) -> Any:
        if "chunk" in stream:
            seen.append("receive")
        return expect(link, stream, src, reuse=reuse)

    with stages(pipeline, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLink, "expect", noting)
        block = next(pipeline.transformer.blocks.children())
        block.register_forward_pre_hook(lambda *_: seen.append("run"))
        pipeline(**guided(doubled=True, rows=2))
    return seen


def test_the_next_piece_is_received_meanwhile_once_a_chunk_has_run(ranks: RankPool) -> None:
    """A device that loads a kernel waits for a receive, and so for a stage that may wait for it."""
    _, seen = ranks.run(receives_and_runs, world_size=2)
    whole_and_first_piece = ["receive", "run"] * 2
    assert seen[:4] == whole_and_first_piece
    assert seen[-4:] == ["receive", "receive", "run", "run"]


@torch.no_grad()
def count_rows(rows: int, options: dict[str, Any]) -> tuple[list[int], list[int]]:
    pipeline = ToyPipeline()
    with stages(pipeline, 2, **options):
        block = next(pipeline.transformer.blocks.children())
        found = []
        for _ in range(2):
            block.calls.clear()
            result = pipeline(**request(rows=rows, steps=1)).sample
            close(result, alone(request(rows=rows, steps=1)))
            found.append(list(block.calls))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (5, {"micro_batches": 3}, [2, 2, 1]),
        (3, {}, [2, 1]),
        (3, {"virtual_stages": 2}, [1, 1, 1]),
        (4, {"micro_batches": 1}, [4]),
        (1, {}, [1]),
        (4, {"shared_inputs": ("hidden_states", "encoder_hidden_states")}, [4]),
    ],
)
def test_rows_are_cut_into_micro_batches(
    ranks: RankPool, rows: int, options: dict[str, Any], expected: list[int]
) -> None:
    for first, second in ranks.run(count_rows, rows, options):
        assert sorted(second) == sorted(expected)
        whole = [rows] if len(expected) > 1 else []  # beside the pieces, to compare
        assert sorted(first) == sorted(whole + expected)


@torch.no_grad()
def coupled_rows() -> list[int]:
    pipeline = ToyPipeline(ToyTransformer(coupled=True))
    with stages(pipeline, 2):
        block = next(pipeline.transformer.blocks.children())
        for _ in range(2):
            block.calls.clear()
            found = pipeline(**request(rows=4)).sample
            expected = alone(request(rows=4), ToyPipeline(ToyTransformer(coupled=True)))
            close(found, expected)
    return block.calls


def test_rows_that_depend_on_each_other_stay_together(ranks: RankPool) -> None:
    assert ranks.run(coupled_rows) == [[4] * 4] * 2


@torch.no_grad()
def order_of_work(virtual: int) -> list[int]:
    """Which blocks run, in order, of the two branches of one step."""
    pipeline = ToyPipeline(ToyTransformer(4))
    with stages(pipeline, 2, virtual_stages=virtual, balance="count"):
        pipeline(**guided())
        ran: list[int] = []
        for name, block in pipeline.transformer.blocks._modules.items():
            block.register_forward_hook(lambda *_, name=name: ran.append(int(name)))
        pipeline(**guided(steps=1))
    return ran


def test_branches_follow_each_other_through_the_stages(ranks: RankPool) -> None:
    assert ranks.run(order_of_work, 1) == [[0, 1, 0, 1], [2, 3, 2, 3]]
    assert ranks.run(order_of_work, 2) == [[0, 0, 2, 2], [1, 1, 3, 3]]


@torch.no_grad()
def bytes_of_a_step(virtual: int) -> tuple[int, int]:
    pipeline = ToyPipeline()
    with stages(pipeline, 2, virtual_stages=virtual):
        pipeline(**guided(length=7, text=3))
        with record_traffic() as traffic:
            pipeline(**guided(length=7, text=3, steps=3))
    return traffic.bytes_sent["send channel"], traffic.calls["send channel"]


@pytest.mark.parametrize("virtual", [1, 2])
def test_a_step_sends_the_flows_and_the_results_and_nothing_else(
    ranks: RankPool, virtual: int
) -> None:
    flow, status, result = (7 + 3) * 8 * 4, 1, 7 * 8 * 4
    first, last = ranks.run(bytes_of_a_step, virtual)
    assert first == (3 * 2 * virtual * (flow + status), 3 * 2 * virtual * 3)
    back = (virtual - 1) * (flow + status)
    assert last == (3 * 2 * (back + result + status), 3 * 2 * ((virtual - 1) * 3 + 2))


@torch.no_grad()
def bare_model() -> None:
    model = ToyTransformer()
    whole = ToyTransformer()
    arguments = request(rows=1)
    prompt, t = arguments["prompt"], torch.tensor([2.0])
    latents = torch.randn(1, 5, 8, generator=arguments["generator"])
    with stages(model, 2) as handle:
        found = model(latents, prompt, t, return_dict=False)[0] + 1
        assert torch.equal(found + 0, whole(latents, prompt, t).sample + 1)
        shown = model.state_dict()
        assert 0 < len(shown) < len(whole.state_dict())
        assert all(torch.equal(whole.state_dict()[name], value) for name, value in shown.items())
    assert handle.removed
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert type(model) is ToyTransformer
    assert torch.equal(model(latents, prompt, t).sample, whole(latents, prompt, t).sample)


def test_a_denoiser_alone_is_cut_and_given_back(ranks: RankPool) -> None:
    ranks.run(bare_model)


class StoppedError(Exception):
    """What a pipeline is broken off with."""


class Stopping(ToyPipeline):
    """Stops after so many calls of its denoiser."""

    calls_left = 10_000

    def __call__(self, *args: Any, **options: Any) -> Any:
        count = itertools.count()

        def stop(*_: object) -> None:
            if next(count) == self.calls_left:
                raise StoppedError

        whole = self.__dict__["transformer"]
        self.__dict__["transformer"] = lambda *args, **kwargs: (stop(), whole(*args, **kwargs))[1]
        try:
            return super().__call__(*args, **options)
        finally:
            self.__dict__["transformer"] = whole


@torch.no_grad()
def broken_off(calls: int) -> None:
    pipeline = Stopping()
    with stages(pipeline, 2):
        for _ in range(2):
            pipeline.calls_left = calls
            with pytest.raises(StoppedError):
                pipeline(**guided())
            pipeline.calls_left = 10_000
            assert torch.equal(pipeline(**guided(1)).sample, alone(guided(1)))


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_request_that_is_broken_off_leaves_no_message_behind(ranks: RankPool, calls: int) -> None:
    ranks.run(broken_off, calls)
