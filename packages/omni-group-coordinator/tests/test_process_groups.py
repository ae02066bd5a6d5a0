import os
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from group_cases import everyone, raised, same, seeded

from omni_group_coordinator import (
    DEFAULT_TIMEOUT,
    CommunicationError,
    ParallelConfigError,
    ParallelError,
    ProcessGroupPool,
    process_groups,
)
from omni_group_coordinator.process_groups import rank_lists, serves_cpu
from rank_harness import RankPool


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([], "holds no rank"),
        ([[0], []], r"\[\[0\], \[\]\] holds no rank or an empty group"),
        ([[0, -2]], "holds the rank -2; ranks start at 0"),
        ([[0, 1], [2, 1]], "holds rank 1 twice"),
        ([[3, 3]], "holds rank 3 twice"),
        ([0, 1], r"group_ranks=\[0, 1\] is no list of groups.* pass \[\[0, 1\]\]"),
    ],
)
def test_rank_lists_that_cannot_be_are_refused(lists: list[list[int]], message: str):
    with pytest.raises(ParallelConfigError, match=message):
        rank_lists(lists)


def test_a_backend_serves_the_cpu_or_gets_a_gloo_group_beside_it():
    assert [serves_cpu(name) for name in ("gloo", "fake", "cpu:gloo,cuda:nccl")] == [True] * 3
    assert not serves_cpu("nccl")


def test_groups_of_one_rank_need_no_process_group():
    assert not dist.is_initialized()
    pool = ProcessGroupPool("gloo")
    assert pool.timeout == DEFAULT_TIMEOUT
    assert pool.groups_for([[0], [1]]) is None
    pool.destroy()


def test_a_group_of_several_ranks_without_a_default_group_says_what_to_call():
    pool = ProcessGroupPool("gloo")
    with pytest.raises(ParallelError, match="init_process_group"):
        pool.groups_for([[0, 1]])


def share_groups() -> None:
    pool = ProcessGroupPool("gloo")
    halves = pool.groups_for([[0, 2], [1, 3]])
    assert halves is not None
    assert halves.ranks == ((0, 2) if dist.get_rank() % 2 == 0 else (1, 3))
    assert halves.cpu is halves.device
    before = dist.distributed_c10d._world.group_count
    assert pool.groups_for([[1, 3], [2, 0]]) is halves
    again = pool.groups_for([[0, 2], [1], [3]])
    assert (again is halves) == (dist.get_rank() % 2 == 0)
    assert (again is None) == (dist.get_rank() % 2 == 1)
    assert dist.distributed_c10d._world.group_count == before
    other = pool.groups_for([[0, 2], [1, 3]], variant="backward")
    assert other is not None
    assert other is not halves
    assert dist.distributed_c10d._world.group_count == before + 2
    pool.destroy()
    pool.destroy()
    message = raised(lambda: dist.get_rank(halves.device), ValueError)
    assert "not registered" in message or "Group" in message
    fresh = pool.groups_for([[0, 2], [1, 3]])
    assert fresh is not None
    assert fresh is not halves
    pool.destroy()


def test_a_set_of_ranks_gets_one_group_and_a_variant_one_of_its_own(ranks: RankPool):
    ranks.run(share_groups, world_size=4)


def cpu_group_beside() -> None:
    pool = ProcessGroupPool("cpu:gloo", timeout=timedelta(seconds=5))
    groups = pool.groups_for([[0, 1]])
    assert groups is not None
    assert groups.cpu is groups.device
    pool.destroy()
    # gloo in the place of a backend that moves no CPU tensors
    with mock.patch.object(process_groups, "serves_cpu", return_value=False):
        groups = pool.groups_for([[0, 1]])
    assert groups is not None
    assert groups.cpu is not groups.device
    assert dist.get_backend(groups.cpu) == "gloo"
    pool.destroy()


def test_a_backend_that_moves_no_cpu_tensors_gets_a_gloo_group_beside_it(ranks: RankPool):
    ranks.run(cpu_group_beside)


def too_high() -> str:
    return raised(lambda: ProcessGroupPool("gloo").groups_for([[0, 1, 2]]), ParallelConfigError)


def test_ranks_beyond_the_world_are_refused_before_any_group_is_made(ranks: RankPool):
    for message in ranks.run(too_high):
        assert "names rank 2, but the world has 2 ranks; legal here: 0 to 1" in message


def outlive_the_default_group(folder: str) -> None:
    pool, other = ProcessGroupPool("gloo"), ProcessGroupPool("gloo")
    pool.groups_for([[0, 1]])
    other.groups_for([[0, 1]])
    dist.destroy_process_group()
    pool.destroy()
    store = dist.FileStore(f"{folder}/again", 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    other.destroy()  # its groups went with the first default group
    same(everyone().all_reduce(torch.ones(2)), torch.full((2,), 2.0))


def test_groups_may_be_destroyed_after_the_default_group(ranks: RankPool, tmp_path: Path):
    ranks.run(outlive_the_default_group, str(tmp_path))


def threads_and_files() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def make_and_destroy() -> tuple[tuple[int, int], tuple[int, int]]:
    everyone().destroy()
    before = threads_and_files()
    for turn in range(20):
        group = everyone()
        same(group.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
        same(group.broadcast(seeded(turn, 3)), seeded(turn, 3))
        group.destroy()
    return before, threads_and_files()


def test_making_and_destroying_groups_leaks_no_thread_and_no_file(ranks: RankPool):
    for before, after in ranks.run(make_and_destroy):
        assert after[0] <= before[0]
        assert after[1] <= before[1]


def unknown_backend(name: str) -> tuple[str, int]:
    before = dist.distributed_c10d._world.group_count
    pool = ProcessGroupPool(name)
    message = raised(lambda: pool.groups_for([[0, 1]]), ParallelConfigError)
    return message, dist.distributed_c10d._world.group_count - before


@pytest.mark.parametrize("name", ["glooo", "cpu:gloo,cuda:nckl"])
def test_a_backend_that_torch_lacks_is_refused_before_any_group_is_made(ranks: RankPool, name: str):
    for message, made in ranks.run(unknown_backend, name):
        wrong = name.rpartition(":")[2]
        assert f"has no backend {wrong!r}; available here: gloo" in message
        assert made == 0


def fail_to_make() -> tuple[str, str]:
    def refuse(*_: object, **__: object) -> None:
        message = "[/w/gloo/pair.cc:1] Connection closed. GLHF!"
        raise RuntimeError(message)

    with (
        mock.patch.object(dist, "new_group", refuse),
        pytest.raises(CommunicationError) as caught,
    ):
        ProcessGroupPool("gloo").groups_for([[0, 1]], name="cfg")
    return str(caught.value), caught.value.group


def test_a_group_that_cannot_be_made_is_named(ranks: RankPool):
    for message, group in ranks.run(fail_to_make):
        assert group == "cfg"
        assert message.startswith("the gloo group 'cfg' of ranks 0, 1 could not be made within 600")
        assert "s: Connection closed.\n" in message


def bound_devices() -> list[object]:
    """What `new_group` is told of the device; gloo stands for a device's backend."""
    seen: list[object] = []
    made = dist.new_group

    def note(*args: object, device_id: object = None, **options: object) -> object:
        seen.append(device_id)
        return made(*args, **options)  # type: ignore[arg-type]

    with mock.patch.object(dist, "new_group", note):
        for backend, device in (
            ("gloo", torch.device("cuda", 1)),
            ("cpu:gloo", torch.device("cpu")),
            ("cpu:gloo", torch.device("cuda")),
            ("cpu:gloo", torch.device("cuda", 1)),
        ):
            pool = ProcessGroupPool(backend, device=device)
            pool.groups_for([[0, 1]])
            pool.destroy()
    return seen


def test_a_group_of_a_device_with_an_index_is_bound_to_it(ranks: RankPool):
    """nccl then connects when the group is made, and not at a message of two of its ranks."""
    for seen in ranks.run(bound_devices):
        assert seen == [None, None, None, torch.device("cuda", 1)]
