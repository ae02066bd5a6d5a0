"""The groups of a layout on real gloo ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
import torch.distributed as dist

from omni_group_coordinator import PipelineGroupCoordinator, SequenceParallelGroupCoordinator
from omni_parallel_state import (
    Dim,
    ParallelConfigError,
    ParallelError,
    ParallelLayout,
    ParallelState,
    destroy_distributed_env,
    get_parallel_state,
    get_sp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)

if TYPE_CHECKING:
    from rank_harness import RankPool

TIMEOUT = timedelta(seconds=20)


def live_groups() -> int:
    """How many process groups this process has, torch's default one included (torch 2.13)."""
    return len(dist.distributed_c10d._world.pg_map)


@contextmanager
def failing_new_group(nth: int, *, everywhere: bool = True) -> Iterator[list[int]]:
    """Let the nth group that torch is asked for fail; the list counts the requests.

    If it fails on all ranks, they wait for each other first: a rank that is ahead would close
    its groups while another still connects to them.
    """
    original, calls = dist.new_group, [0]

    def new_group(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            if everywhere:
                dist.barrier()
            msg = "planted failure"
            raise OSError(msg)
        return original(*args, **kwargs)

    dist.new_group = new_group
    try:
        yield calls
    finally:
        dist.new_group = original


def members_seen_by_all_reduce(layout: ParallelLayout) -> dict[str, list[int]]:
    """Who is in each of this rank's groups, by a sum of one bit for each rank."""
    state = ParallelState(layout, timeout=TIMEOUT)
    seen = {}
    for dim in Dim:
        bits = getattr(state, dim).all_reduce(torch.tensor([2**state.rank]))
        seen[dim.value] = [rank for rank in range(layout.world_size) if int(bits) >> rank & 1]
        assert getattr(state, dim).ranks == seen[dim.value]
    state.destroy()
    return seen


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(ulysses=2),
        ParallelLayout(ring=3),
        ParallelLayout(cfg=2, ulysses=2, vae=4, fs=2, replicate=2),
        ParallelLayout(tp=2, pp=2),
        ParallelLayout(tp=2, ulysses=2, ring=2),
        ParallelLayout(dp=2, cfg=2, pp=2, vae=2),
        ParallelLayout(cfg=2, ring=2, ulysses=2, order="cfg-sp-tp-pp-dp", fs=4),
    ],
    ids=lambda layout: layout.describe().splitlines()[0],
)
def test_a_sum_over_each_coordinator_adds_up_exactly_the_ranks_of_the_layout(
    ranks: RankPool, layout: ParallelLayout
) -> None:
    for rank, seen in enumerate(
        ranks.run(members_seen_by_all_reduce, layout, world_size=layout.world_size)
    ):
        for dim in Dim:
            assert tuple(seen[dim]) == layout.group_of(rank, dim), (rank, dim)


def facts_of_a_state(layout: ParallelLayout) -> dict[str, Any]:
    with failing_new_group(0) as calls:
        state = ParallelState(layout, timeout=TIMEOUT)
    return {
        "classes": (type(state.pp), type(state.sp)),
        "sp": (
            state.sp.ring_rank,
            state.sp.ring_world_size,
            state.sp.ulysses_rank,
            state.sp.ulysses_world_size,
        ),
        "sequence": state.sp.rank_in_group == layout.sequence_position(state.rank),
        "same": state.dit.device_group is state.world.device_group,
        "alone": state.dp.device_group,
        "calls": calls[0],
        "text": repr(state),
    }


def test_coordinators_have_their_class_and_groups_are_made_once_for_each_set_of_ranks(
    ranks: RankPool,
) -> None:
    layout = ParallelLayout(ring=2, ulysses=2, vae=4)
    for rank, facts in enumerate(ranks.run(facts_of_a_state, layout, world_size=4)):
        assert facts["classes"] == (PipelineGroupCoordinator, SequenceParallelGroupCoordinator)
        assert facts["sp"] == (rank // 2, 2, rank % 2, 2)
        assert facts["sequence"]
        assert facts["same"]
        assert facts["alone"] is None
        assert facts["calls"] == 5  # all four ranks once, two Ring groups, two Ulysses groups
        assert facts["text"] == f"ParallelState(rank={rank}, {layout})"


def test_a_layout_of_one_rank_needs_no_process_group() -> None:
    state = ParallelState(ParallelLayout())

    assert not dist.is_initialized()
    for dim in Dim:
        assert getattr(state, dim).world_size == 1
        assert getattr(state, dim).device_group is None
    assert state.rank == 0
    assert state.device == torch.device("cpu") or torch.accelerator.is_available()
    state.destroy()


def two_layouts_in_one_process() -> tuple[list[Any], ...]:
    first = ParallelState(ParallelLayout(cfg=2, ulysses=2), timeout=TIMEOUT)
    second = ParallelState(ParallelLayout(ring=4), timeout=TIMEOUT)
    bit = torch.tensor([2**first.rank])
    with first.use():
        outer = [get_sp_group().ranks, int(get_sp_group().all_reduce(bit.clone()))]
        with second.use() as inner_state:
            assert get_parallel_state() is inner_state is second
            inner = [get_sp_group().ranks, int(get_sp_group().all_reduce(bit.clone()))]
        back = [get_sp_group().ranks, int(get_world_group().all_reduce(bit.clone()))]
    first.destroy()
    after = [second.sp.ranks, int(second.sp.all_reduce(bit.clone()))]
    second.destroy()
    return outer, inner, back, after


def test_two_layouts_live_in_one_process_and_use_nests(ranks: RankPool) -> None:
    for rank, (outer, inner, back, after) in enumerate(
        ranks.run(two_layouts_in_one_process, world_size=4)
    ):
        pair = [0, 1] if rank < 2 else [2, 3]
        assert outer == [pair, sum(2**r for r in pair)]
        assert inner == after == [[0, 1, 2, 3], 15]
        assert back == [pair, 15]


def test_use_ends_with_its_block_also_after_an_error() -> None:
    state = ParallelState(ParallelLayout())
    with pytest.raises(KeyError), state.use():
        raise KeyError
    with pytest.raises(ParallelError, match=r"call init_distributed_environment\(\)"):
        get_parallel_state()


def test_a_block_is_current_in_its_own_thread_only() -> None:
    state = ParallelState(ParallelLayout())
    found: list[object] = []

    def other_thread() -> None:
        try:
            found.append(get_parallel_state())
        except ParallelError as error:
            found.append(type(error))

    with state.use():
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert get_parallel_state() is state
    assert found == [ParallelError]


def failures_at_every_group(layout: ParallelLayout) -> list[tuple[int, int, bool]]:
    before = live_groups()
    with failing_new_group(0) as calls:
        ParallelState(layout, timeout=TIMEOUT).destroy()
    left = []
    for nth in range(1, calls[0] + 1):
        with failing_new_group(nth):
            try:
                initialize_model_parallel(ulysses_degree=layout.ulysses, cfg_parallel_size=2)
            except OSError:
                left.append((before, live_groups(), model_parallel_is_initialized()))
    state = ParallelState(layout, timeout=TIMEOUT)
    assert int(state.world.all_reduce(torch.ones(1, dtype=torch.int64))) == layout.world_size
    assert live_groups() > before
    state.destroy()
    state.destroy()
    assert live_groups() == before
    return left


def test_an_init_that_fails_at_any_group_leaves_none_behind(ranks: RankPool) -> None:
    for left in ranks.run(failures_at_every_group, ParallelLayout(cfg=2, ulysses=2), world_size=4):
        assert left == [(1, 1, False)] * 5  # the world, two cfg pairs, two sp pairs


def one_rank_fails(layout: ParallelLayout, nth: int) -> tuple[str, int]:
    with failing_new_group(nth if dist.get_rank() == 1 else 0, everywhere=False):
        try:
            ParallelState(layout, timeout=timedelta(seconds=2))
        except (OSError, RuntimeError):
            return "failed", live_groups()
    return "made", live_groups()


@pytest.mark.parametrize("nth", [2, 5], ids=["in the middle", "at a group of other ranks"])
def test_a_failure_on_one_rank_is_one_on_every_rank_and_leaves_no_group(
    ranks: RankPool, nth: int
) -> None:
    found = ranks.run(one_rank_fails, ParallelLayout(cfg=2, ulysses=2), nth, world_size=4)

    assert found == [("failed", 1)] * 4


def measured_cycles(count: int) -> tuple[list[int], list[int], list[int]]:
    """Threads, open files and resident bytes after each cycle; with the world, if not there."""
    process = psutil.Process()
    threads, files, memory = [], [], []
    for _ in range(count):
        init_distributed_environment(timeout=TIMEOUT)
        state = initialize_model_parallel(cfg_parallel_size=2, ulysses_degree=2)
        state.mesh(("replicate", "shard"))
        state.sp.all_reduce(torch.ones(1000))
        destroy_distributed_env()
        threads.append(process.num_threads())
        files.append(process.num_fds())
        memory.append(process.memory_info().rss)
    return threads, files, memory


@pytest.mark.parametrize("init", [True, False], ids=["state", "state and world"])
def test_50_times_init_and_destroy_leak_no_thread_file_or_memory(
    ranks: RankPool, init: bool
) -> None:
    for threads, files, memory in ranks.run(measured_cycles, 50, world_size=4, init=init):
        # The first cycles may load libraries and open the store that is kept. A thread may still
        # be ending when it is counted, so one high count is no leak; one leak a cycle is forty.
        assert min(threads[-10:]) <= max(threads[:10])
        assert min(files[-10:]) <= max(files[:10])
        assert memory[-1] - memory[9] < 4 * 2**20


def errors_of_a_wrong_world() -> list[str]:
    texts = []
    before = live_groups()
    for layout in (ParallelLayout(ulysses=2), ParallelLayout(cfg=8)):
        try:
            ParallelState(layout)
        except ParallelConfigError as error:
            texts.append(str(error))
    assert live_groups() == before
    return texts


def test_a_layout_of_another_size_than_the_world_is_refused_before_any_group_is_made(
    ranks: RankPool,
) -> None:
    for texts in ranks.run(errors_of_a_wrong_world, world_size=4):
        assert texts == [
            "ulysses=2 lays out 2 ranks, but the world has 4; nearest legal: dp: 2; ulysses: 4; or "
            "a world of 2 ranks",
            "cfg=8 lays out 8 ranks, but the world has 4; nearest legal: cfg: 4; or a world of 8 "
            "ranks",
        ]


def test_several_ranks_without_a_default_group_are_an_error_with_the_remedy() -> None:
    with pytest.raises(ParallelError, match=r"call init_distributed_environment\(\) first"):
        ParallelState(ParallelLayout(ulysses=2))


def test_a_destroyed_state_refuses_to_be_used() -> None:
    state = ParallelState(ParallelLayout())
    block = state.use()
    with block:
        state.destroy()
        with pytest.raises(ParallelError, match="has been destroyed"):
            get_parallel_state()
        with pytest.raises(ParallelError, match=r"call init_distributed_environment\(\)"):
            get_world_group()
    for refused in (state.use, state.device_mesh, lambda: state.set_dit_size(1)):
        with pytest.raises(ParallelError, match="make a new state"):
            refused()


def outlive_the_default_group() -> list[bool]:
    state = ParallelState(ParallelLayout(ulysses=2), timeout=TIMEOUT)
    kept = initialize_model_parallel(ulysses_degree=2)
    store = dist.FileStore(os.environ["STORE"], 2)
    rank = dist.get_rank()
    dist.destroy_process_group()
    gone = [state.destroyed, kept.destroyed, not model_parallel_is_initialized()]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    state.destroy()
    again = initialize_model_parallel(ring_degree=2)
    works = int(again.ring.all_reduce(torch.ones(1, dtype=torch.int64))) == 2
    destroy_distributed_env()
    return [*gone, works]


def test_a_state_ends_with_the_default_group_that_its_groups_belong_to(
    ranks: RankPool, tmp_path: Any
) -> None:
    env = {"STORE": str(tmp_path / "store")}
    for facts in ranks.run(outlive_the_default_group, world_size=2, env=env):
        assert facts == [True, True, True, True]


def dit_on_fewer_ranks(size: int, backend: str | None) -> tuple[list[int], int, int]:
    before = live_groups()
    state = ParallelState(ParallelLayout(dp=4), timeout=TIMEOUT)
    state.set_dit_size(size, backend)
    total = int(state.dit.all_reduce(torch.tensor([2**state.rank])))
    found = state.dit.ranks, total, state.world.world_size
    state.destroy()
    assert live_groups() == before
    return found


@pytest.mark.parametrize("backend", [None, "cpu:gloo"])
def test_the_transformer_can_run_on_the_first_ranks_only(
    ranks: RankPool, backend: str | None
) -> None:
    found = ranks.run(dit_on_fewer_ranks, 3, backend, world_size=4)

    assert found == [*[([0, 1, 2], 7, 4)] * 3, ([3], 8, 4)]


@pytest.mark.parametrize(("size", "message"), [(2, "nearest legal value is 1"), (0, "=0 is no")])
def test_an_impossible_number_of_transformer_ranks_is_refused(size: int, message: str) -> None:
    state = ParallelState(ParallelLayout())
    with pytest.raises(ParallelConfigError, match=message):
        state.set_dit_size(size)


def chosen(make: Callable[[], ParallelState]) -> tuple[str, str, timedelta]:
    state = make()
    return state.backend, str(state.device), state.timeout


def test_backend_device_and_timeout_follow_the_default_group_unless_given(
    ranks: RankPool,
) -> None:
    layout = ParallelLayout(ulysses=2)
    assert (
        ranks.run(chosen, lambda: ParallelState(layout))
        == [("gloo", "cpu", timedelta(minutes=10))] * 2
    )
    given = ranks.run(
        chosen, lambda: ParallelState(layout, "meta", TIMEOUT, backend="cpu:gloo", debug=True)
    )
    assert given == [("cpu:gloo", "meta", TIMEOUT)] * 2


@pytest.mark.parametrize("timeout", [5, timedelta(0)])
def test_a_timeout_is_a_positive_timedelta(timeout: Any) -> None:
    with pytest.raises(ParallelConfigError, match=r"is no positive datetime\.timedelta"):
        ParallelState(ParallelLayout(), timeout=timeout)


def mesh_of_one_name() -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    mesh = ParallelState(ParallelLayout(ulysses=2), timeout=TIMEOUT).mesh("ulysses")
    return mesh.mesh_dim_names, tuple(mesh.shape)


def test_a_mesh_of_one_dimension_takes_its_bare_name(ranks: RankPool) -> None:
    assert ranks.run(mesh_of_one_name) == [(("ulysses",), (2,))] * 2


def different_layouts() -> str:
    odd = dist.get_rank() == 2
    layout = ParallelLayout(ulysses=4) if odd else ParallelLayout(cfg=2, ulysses=2)
    with pytest.raises(ParallelConfigError) as caught:
        ParallelState(layout, timeout=TIMEOUT)
    assert live_groups() == 1
    return str(caught.value)


def test_different_layouts_are_an_error_on_every_rank_that_names_them(ranks: RankPool) -> None:
    texts = ranks.run(different_layouts, world_size=4)
    assert len(set(texts)) == 1
    assert "ranks 0, 1, 3: ParallelLayout(dp=1, cfg=2," in texts[0]
    assert "rank 2: ParallelLayout(dp=1, cfg=1," in texts[0]


def test_a_device_without_a_known_backend_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for device in (None, "mps"):
        state = ParallelState(ParallelLayout(), device)
        assert (state.backend, state.device.type) == ("gloo", device or "cpu")
        state.destroy()
