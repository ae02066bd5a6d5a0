"""The state of the process and the getters."""

from __future__ import annotations

import inspect
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import omni_parallel_state
from omni_group_coordinator import (
    GroupCoordinator,
    PipelineGroupCoordinator,
    SequenceParallelGroupCoordinator,
)
from omni_parallel_state import (
    ParallelConfigError,
    ParallelError,
    ParallelLayout,
    ParallelState,
    destroy_distributed_env,
    destroy_model_parallel,
    get_dit_world_size,
    get_parallel_state,
    get_sp_group,
    init_distributed_environment,
    init_dit_group,
    init_model_parallel_group,
    initialize_model_parallel,
    is_dp_last_group,
    model_parallel_is_initialized,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rank_harness import RankPool

TIMEOUT = timedelta(seconds=20)
GETTERS = sorted(
    name
    for name in omni_parallel_state.__all__
    if name.startswith(("get_", "is_"))
    and not inspect.signature(getattr(omni_parallel_state, name)).parameters
)

DIM_OF_GETTER = {
    "get_sequence_parallel": "sp",
    "get_ulysses_parallel": "ulysses",
    "get_ring_parallel": "ring",
    "get_pipeline_parallel": "pp",
    "get_classifier_free_guidance": "cfg",
    "get_data_parallel": "dp",
    "get_tensor_parallel": "tp",
    "get_fully_shard": "fs",
    "get_vae": "vae",
    "get_dit": "dit",
}
GROUP_GETTERS = ("world", "sp", "ulysses", "ring", "pp", "cfg", "dp", "tp", "fs", "dit", "vae")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    destroy_distributed_env()


def ask_everything(degrees: dict[str, int]) -> dict[str, Any]:
    init_distributed_environment(timeout=TIMEOUT)
    state = initialize_model_parallel(**degrees)  # type: ignore[arg-type]
    answers: dict[str, Any] = {}
    for name in GETTERS:
        answer = getattr(omni_parallel_state, name)()
        if isinstance(answer, GroupCoordinator):
            answer = answer.ranks
        answers[name] = answer
    assert answers.pop("get_parallel_state") is state
    destroy_distributed_env()
    return answers


def test_every_getter_answers_what_the_layout_says(ranks: RankPool) -> None:
    layout = ParallelLayout(cfg=2, pp=2, ulysses=2, fs=2, vae=4)
    degrees = {
        "cfg_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "ulysses_degree": 2,
        "sequence_parallel_size": 2,
        "fully_shard_degree": 2,
        "vae_parallel_size": 4,
    }
    for rank, answers in enumerate(ranks.run(ask_everything, degrees, world_size=8)):
        at = layout.coordinates(rank)
        expected: dict[str, Any] = {
            f"get_{dim}_group": list(layout.group_of(rank, dim)) for dim in GROUP_GETTERS
        }
        for getter, dim in DIM_OF_GETTER.items():
            expected[f"{getter}_world_size"] = layout.degree(dim)
            expected[f"{getter}_rank"] = at[dim]
        expected["get_replicate_group"] = [rank]
        expected["is_pipeline_first_stage"] = at["pp"] == 0
        expected["is_pipeline_last_stage"] = at["pp"] == 1
        expected["is_dp_last_group"] = rank == 7
        assert answers == expected


@pytest.mark.parametrize("getter", GETTERS)
def test_a_getter_before_init_is_a_runtime_error_with_the_remedy(getter: str) -> None:
    with pytest.raises(RuntimeError, match=r"call init_distributed_environment\(\)"):
        getattr(omni_parallel_state, getter)()


def test_init_dit_group_before_init_is_a_runtime_error_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"initialize_model_parallel\(\.\.\.\) first"):
        init_dit_group(1)


def test_a_second_init_is_refused_with_the_remedy_and_works_after_destroy() -> None:
    first = initialize_model_parallel()
    assert model_parallel_is_initialized()
    with pytest.raises(ParallelError, match=r"exists already; call destroy_model_parallel\(\)"):
        initialize_model_parallel()
    assert get_parallel_state() is first

    destroy_model_parallel()
    destroy_model_parallel()

    assert not model_parallel_is_initialized()
    assert first.destroyed
    assert initialize_model_parallel() is not first


def test_a_state_destroyed_by_its_own_method_makes_room_for_the_next() -> None:
    initialize_model_parallel().destroy()

    assert not model_parallel_is_initialized()
    assert initialize_model_parallel() is get_parallel_state()


def test_every_thread_sees_the_state_of_the_process_and_a_block_goes_before_it() -> None:
    default = initialize_model_parallel()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(get_parallel_state()))
    other = ParallelState(ParallelLayout())
    with other.use():
        thread.start()
        thread.join()
        assert get_parallel_state() is other
    assert seen == [default]
    assert get_parallel_state() is default


def init_with(degrees: dict[str, Any]) -> list[int]:
    state = initialize_model_parallel(**degrees)
    found = [state.layout.dp, state.layout.world_size]
    destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("degrees", "dp"),
    [
        ({"data_parallel_size": None, "ulysses_degree": 2}, 2),
        ({"data_parallel_size": 4}, 4),
        ({"fully_shard_degree": 2, "hsdp_replicate_size": 2}, 4),
        ({"cfg_parallel_size": 2, "ring_degree": 2, "order": "tp-cfg-sp-pp-dp"}, 1),
    ],
)
def test_degrees_that_fit_the_world_make_a_state(
    ranks: RankPool, degrees: dict[str, Any], dp: int
) -> None:
    assert ranks.run(init_with, degrees, world_size=4) == [[dp, 4]] * 4


def errors_of(cases: list[dict[str, Any]]) -> list[str]:
    texts = []
    for degrees in cases:
        try:
            initialize_model_parallel(**degrees)
        except ParallelConfigError as error:
            texts.append(str(error))
        assert len(dist.distributed_c10d._world.pg_map) == 1
        assert not model_parallel_is_initialized()
    return texts


def test_degrees_that_do_not_fit_the_world_make_nothing_and_name_the_nearest(
    ranks: RankPool,
) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"ulysses_degree": 3, "data_parallel_size": None},
        {"ulysses_degree": 4, "sequence_parallel_size": 2},
        {"ulysses_degree": 0},
        {"data_parallel_size": -1},
        {"ulysses_degree": 4, "order": "tp-sq"},
        {"ulysses_degree": 4, "fully_shard_degree": 3},
        {"cfg_parallel_size": 1.0},
        {"order": None},
    ]
    for texts in ranks.run(errors_of, cases, world_size=4):
        assert texts[0].endswith(
            "the world has 4; nearest legal: data_parallel_size=4 (or None to infer); or a world "
            "of 1 rank"
        )
        assert texts[1].endswith(
            "4 ranks; nearest legal: ulysses_degree: 1, 2, 4; or a world of 3 or 6 ranks"
        )
        assert texts[2].endswith(
            "leave it out, or choose ulysses_degree * ring_degree as 1 * 2, 2 * 1"
        )
        assert texts[3].startswith("ulysses_degree=0 is no degree")
        assert texts[4].startswith("data_parallel_size=-1 is no degree")
        assert "unknown dimension 'sq'" in texts[5]
        assert texts[6].startswith("fully_shard_degree=3 does not divide")
        assert texts[6].endswith(
            "nearest legal fully_shard_degree with hsdp_replicate_size=1: 1, 2, 4"
        )
        assert texts[7].startswith("cfg_parallel_size=1.0 is a float")
        assert texts[8].startswith("order=None names the unknown dimension")


def ask_for_different_things(cases: list[list[dict[str, Any]]]) -> list[str]:
    texts = []
    for case in cases:
        with pytest.raises(ParallelConfigError) as caught:
            initialize_model_parallel(**case[dist.get_rank()], timeout=TIMEOUT)
        texts.append(str(caught.value))
        assert len(dist.distributed_c10d._world.pg_map) == 1
        assert not model_parallel_is_initialized()
    return texts


def test_ranks_that_ask_for_different_layouts_all_hear_who_asked_for_what(
    ranks: RankPool,
) -> None:
    cases: list[list[dict[str, Any]]] = [
        [{"ulysses_degree": 2}, {"cfg_parallel_size": 2}],
        [{"ulysses_degree": 2}, {"ulysses_degree": 3}],  # refused on one rank alone
        [{"ulysses_degree": 2}, {"ulysses_degree": 2, "backend": "cpu:gloo"}],
    ]
    first, second = ranks.run(ask_for_different_things, cases, world_size=2)
    assert first[0] == second[0]
    for text in first:
        assert text.startswith("the ranks do not ask for the same parallel state:\n  rank 0: ")
    assert "rank 0: ParallelLayout(dp=1, cfg=1, pp=1, ring=1, ulysses=2," in first[0]
    assert "rank 1: ParallelLayout(dp=1, cfg=2, pp=1, ring=1, ulysses=1," in first[0]
    assert "rank 1: refused: ulysses_degree=3 lays out 3 ranks" in first[1]
    assert "on cpu:gloo" in first[2]


def test_a_rank_that_torchrun_started_does_not_work_alone_without_its_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for make in (initialize_model_parallel, lambda: ParallelState(ParallelLayout())):
        with pytest.raises(ParallelError, match=r"rank 1 of 2 .*init_distributed_environment\(\)"):
            make()
    monkeypatch.setenv("WORLD_SIZE", "1")
    ParallelState(ParallelLayout()).destroy()


def test_several_ranks_before_init_of_the_environment_are_an_error_with_the_remedy() -> None:
    with pytest.raises(ParallelError, match=r"call init_distributed_environment\(\) first"):
        initialize_model_parallel(ulysses_degree=2)
    assert not model_parallel_is_initialized()


def environment_then_state() -> tuple[timedelta, str, bool, bool]:
    init_distributed_environment(backend="gloo", timeout=TIMEOUT, device="meta")
    state = initialize_model_parallel(ulysses_degree=2)
    found = state.timeout, str(state.device)
    destroy_model_parallel()
    kept = dist.is_initialized()
    initialize_model_parallel(ulysses_degree=2)
    omni_parallel_state.destroy_distributed_environment()
    return *found, kept, model_parallel_is_initialized() or dist.is_initialized()


def test_the_state_follows_its_environment(ranks: RankPool) -> None:
    found = ranks.run(environment_then_state, world_size=2, init=False)
    assert found == [(TIMEOUT, "meta", True, False)] * 2


def dit_group() -> tuple[int, bool]:
    initialize_model_parallel(data_parallel_size=3)
    init_dit_group(2)
    found = get_dit_world_size(), is_dp_last_group()
    destroy_model_parallel()
    return found


def test_the_transformer_can_run_on_fewer_ranks(ranks: RankPool) -> None:
    assert ranks.run(dit_group, world_size=3) == [(2, True), (2, True), (1, True)]


def group_of_mode(mode: str) -> tuple[type, str, int]:
    group = init_model_parallel_group([[0, 1], [2, 3]], 0, "gloo", mode)
    total = int(group.all_reduce(torch.tensor([2 ** dist.get_rank()])))
    group.destroy()
    return type(group), group.name, total


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("data", GroupCoordinator), ("pipeline", PipelineGroupCoordinator)],
)
def test_a_group_for_a_mode_has_the_coordinator_of_the_mode(
    ranks: RankPool, mode: str, kind: type
) -> None:
    found = ranks.run(group_of_mode, mode, world_size=4)
    assert found == [(kind, mode, 3)] * 2 + [(kind, mode, 12)] * 2


def test_a_sequence_group_takes_its_parts() -> None:
    group = init_model_parallel_group(
        [[0]], 0, "gloo", "sequence", ulysses_group=None, ring_group=None, name="mine"
    )
    assert isinstance(group, SequenceParallelGroupCoordinator)
    assert (group.name, group.ring_world_size) == ("mine", 1)


def test_an_unknown_mode_names_the_modes_there_are() -> None:
    with pytest.raises(ParallelConfigError, match="'expert' is unknown; legal: data, class"):
        init_model_parallel_group([[0]], 0, "gloo", "expert")


def test_sp_group_of_one_rank_is_the_identity() -> None:
    initialize_model_parallel()
    tensor = torch.arange(3.0)
    assert get_sp_group().all_gather(tensor) is tensor or torch.equal(
        get_sp_group().all_gather(tensor), tensor
    )
