"""torch's default process group: made, adopted, and given up."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from omni_parallel_state import (
    ParallelConfigError,
    ParallelError,
    _rendezvous,
    destroy_distributed_env,
    destroy_distributed_environment,
    environment,
    get_world_group,
    init_distributed_environment,
    init_world_group,
    initialize_model_parallel,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rank_harness import RankPool

TIMEOUT = timedelta(seconds=15)
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def outside_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank in the environment of the test's own process, and nothing left behind."""
    for name in TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    destroy_distributed_env()


def sum_of_ranks() -> int:
    world = get_world_group()
    return int(world.all_reduce(torch.tensor([world.rank + 1])))


def init_by(method: str, times: int) -> list[tuple[int, int, bool]]:
    """Make and destroy the world some times; file:// needs a fresh file for each."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = []
    for index in range(times):
        if method == "env://":
            world = init_distributed_environment(timeout=TIMEOUT)
        else:
            url = method.format(port=os.environ["MASTER_PORT"], index=index)
            world = init_distributed_environment(size, rank, url, rank, "gloo", timeout=TIMEOUT)
        found.append((world.world_size, sum_of_ranks(), dist.is_initialized()))
        destroy_distributed_environment()
        destroy_distributed_environment()
        assert not dist.is_initialized()
    return found


def test_env_method_takes_everything_from_the_environment_again_and_again(ranks: RankPool) -> None:
    assert ranks.run(init_by, "env://", 3, world_size=3, init=False) == [[(3, 6, True)] * 3] * 3


def test_tcp_method_meets_at_an_address(ranks: RankPool) -> None:
    found = ranks.run(init_by, "tcp://127.0.0.1:{port}", 1, world_size=2, init=False)
    assert found == [[(2, 3, True)]] * 2


def test_file_method_meets_in_a_file(ranks: RankPool, tmp_path: Path) -> None:
    method = f"file://{tmp_path}/meeting{{index}}"
    assert ranks.run(init_by, method, 2, world_size=2, init=False) == [[(2, 3, True)] * 2] * 2


def as_a_new_process(times: int) -> list[int]:
    """What a worker does that torchrun has just started: no store is open yet."""
    _rendezvous._open.store = None
    found = []
    for _ in range(times):
        init_distributed_environment(timeout=TIMEOUT)
        initialize_model_parallel(ulysses_degree=2)
        found.append(sum_of_ranks())
        destroy_distributed_env()
    return found


def test_a_store_of_torchruns_agent_serves_a_second_init_and_restarted_workers(
    ranks: RankPool,
) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in range(2):
        env = {
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "MASTER_PORT": str(agent.port),
        }
        found = ranks.run(as_a_new_process, 2, world_size=2, init=False, env=env)
        assert found == [[3, 3], [3, 3]]


def recover_in_a_new_attempt() -> int:
    """Rank 1 dies before it has met rank 0, as far as rank 0 can tell."""
    if os.environ["RANK"] == "0":
        with pytest.raises(RuntimeError):
            init_distributed_environment(timeout=timedelta(seconds=1))
        assert not dist.is_initialized()
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return as_a_new_process(1)[0]


def test_ranks_meet_in_a_new_attempt_even_if_only_some_had_tried_the_first(
    ranks: RankPool,
) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(agent.port)}
    found = ranks.run(recover_in_a_new_attempt, world_size=2, init=False, env=env)
    assert found == [3, 3]


def init_after_the_host_has_gone(first: bool) -> int:
    """The store that is kept open is one that nobody serves any more, at the same address."""
    init_distributed_environment(timeout=TIMEOUT)
    destroy_distributed_env()
    if first:
        return 0
    if os.environ["RANK"] == "0":
        _rendezvous._open.store = None  # closes the store that this rank hosts
    else:
        while True:
            try:
                _rendezvous._open.store.add("probe", 1)  # type: ignore[union-attr]
            except RuntimeError:
                break
    init_distributed_environment(timeout=TIMEOUT)
    found = sum_of_ranks()
    destroy_distributed_env()
    return found


def test_a_store_whose_host_has_gone_is_replaced(ranks: RankPool) -> None:
    assert ranks.run(init_after_the_host_has_gone, False, world_size=2, init=False) == [3, 3]


def test_ranks_with_different_histories_find_each_other(ranks: RankPool) -> None:
    ranks.run(init_after_the_host_has_gone, True, world_size=1, init=False)
    assert ranks.run(init_by, "env://", 1, world_size=2, init=False) == [[(2, 3, True)]] * 2


SCRIPT = """
import os, signal
from omni_parallel_state import (
    destroy_distributed_env, init_distributed_environment, initialize_model_parallel
)
import torch
init_distributed_environment()
state = initialize_model_parallel(ulysses_degree=2)
total = int(state.sp.all_reduce(torch.ones(1)))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and state.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
# In one write: the ranks share a pipe, and print may write a line in pieces.
os.write(1, f"total {total} attempt {attempt}\\n".encode())
destroy_distributed_env()
"""


@pytest.mark.slow
def test_workers_that_torchrun_restarts_find_each_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "--master-port=0", "--rdzv-backend=c10d", str(script)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("total 2 attempt 1") == 2


def test_one_rank_alone_needs_no_process_group() -> None:
    world = init_distributed_environment()

    assert (world.world_size, world.rank, world.device_group) == (1, 0, None)
    assert get_world_group() is world
    assert not dist.is_initialized()
    assert initialize_model_parallel().sp.world_size == 1
    assert init_distributed_environment(1, 0) is world


def test_the_accelerator_of_the_local_rank_is_made_current(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)

    world = init_distributed_environment(device="cuda:3")

    assert chosen == [3]
    assert world.device == torch.device("cuda", 3)


def test_one_rank_gets_a_process_group_where_it_asks_for_one(tmp_path: Path) -> None:
    init_distributed_environment(1, 0, f"file://{tmp_path}/meeting")

    assert dist.get_world_size() == 1
    assert initialize_model_parallel().device_mesh().shape == (1, 1, 1, 1, 1, 1)


def adopt() -> list[Any]:
    default = dist.group.WORLD
    world = init_distributed_environment()
    again = init_distributed_environment(3, dist.get_rank(), backend="gloo")
    found = [again is world, sum_of_ranks()]
    for arguments in ({"world_size": 5}, {"rank": (dist.get_rank() + 1) % 3}, {"backend": "nccl"}):
        try:
            init_distributed_environment(**arguments)  # type: ignore[arg-type]
        except ParallelConfigError as error:
            found.append(str(error))
    destroy_distributed_environment()
    return [*found, dist.group.WORLD is default]


def test_a_default_group_of_the_caller_is_adopted_and_left_alone(ranks: RankPool) -> None:
    for rank, (same, total, size, other, backend, kept) in enumerate(
        ranks.run(adopt, world_size=3)
    ):
        remedy = "call destroy_distributed_environment() first, or leave"
        assert same
        assert total == 6
        assert size.startswith("world_size=5 was asked for, but this process already has")
        assert f"world_size=3; {remedy} world_size out" in size
        assert f"already has rank={rank}" in other
        assert f"backend='gloo'; {remedy} backend out" in backend
        assert kept


def adopt_wrongly() -> bool:
    with pytest.raises(ParallelConfigError, match="world_size=7"):
        init_distributed_environment(7, 0)
    with pytest.raises(ParallelError, match="the world is not known"):
        get_world_group()
    return init_distributed_environment().world_size == 2


def test_contradicting_the_callers_default_group_leaves_nothing_behind(ranks: RankPool) -> None:
    assert ranks.run(adopt_wrongly, world_size=2) == [True, True]


def other_backend() -> int:
    """Where one group serves every device, the world is torch's own; else it has its own."""
    world = init_distributed_environment(backend="cpu:gloo", timeout=TIMEOUT)
    assert world.device_group is dist.group.WORLD
    found = sum_of_ranks()
    destroy_distributed_env()
    serves = environment.serves_cpu
    environment.serves_cpu = lambda _: False
    try:
        world = init_distributed_environment(backend="cpu:gloo", timeout=TIMEOUT, device="meta")
    finally:
        environment.serves_cpu = serves
    assert world.checked is not None
    assert world.device_group is not dist.group.WORLD
    assert (world.checked.timeout, str(world.device)) == (TIMEOUT, "meta")
    assert sum_of_ranks() == found
    destroy_distributed_env()
    return found


def test_any_backend_that_torch_knows_can_be_named(ranks: RankPool) -> None:
    assert ranks.run(other_backend, world_size=2, init=False) == [3, 3]


def fail_in_the_middle() -> bool:
    """Making the default group works, making the world's own groups does not."""
    original, serves = dist.new_group, environment.serves_cpu

    def new_group(*_: Any, **__: Any) -> None:
        msg = "planted failure"
        raise OSError(msg)

    dist.new_group = new_group
    environment.serves_cpu = lambda _: False  # as for a backend of an accelerator
    try:
        with pytest.raises(OSError, match="planted"):
            init_distributed_environment(backend="cpu:gloo", timeout=TIMEOUT)
    finally:
        dist.new_group, environment.serves_cpu = original, serves
    left = dist.is_initialized()
    init_distributed_environment(timeout=TIMEOUT)
    destroy_distributed_env()
    return left


def test_an_init_that_fails_half_way_leaves_no_default_group(ranks: RankPool) -> None:
    assert ranks.run(fail_in_the_middle, world_size=2, init=False) == [False, False]


def own_world() -> int:
    world = init_world_group([0, 1], 0, "gloo")
    total = int(world.all_reduce(torch.ones(1)))
    world.destroy()
    return total


def test_init_world_group_makes_a_group_of_its_own(ranks: RankPool) -> None:
    assert ranks.run(own_world, world_size=2) == [2, 2]


def test_the_world_group_before_any_init_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ParallelError, match=r"call init_distributed_environment\(\) first"):
        get_world_group()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((0,), {}, "world_size=0 .* nearest legal value is world_size=1"),
        ((-2,), {}, "world_size=-2"),
        ((2, 2), {}, "rank=2 is not in a world of 2 ranks; legal: 0 to 1"),
        ((2, -3), {}, "rank=-3 is negative"),
        ((2, 0, "env://", -2), {}, "local_rank=-2 is negative"),
        ((2, 0, "mpi://"), {}, "'mpi://' is no known method; legal: env://, tcp://, file://"),
        ((2,), {}, "rank not known for 'env://'; start the processes with torchrun"),
        ((-1, -1, "tcp://127.0.0.1:1"), {}, "world_size and rank not known for 'tcp:"),
        ((2, 0), {}, "MASTER_ADDR or MASTER_PORT is not set"),
        ((), {"RANK": "0"}, "world_size not known for 'env://'"),
        ((), {"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no whole number"),
        ((), {"RANK": "4", "WORLD_SIZE": "4"}, "rank=4 is not in a world of 4 ranks"),
        ((), {"WORLD_SIZE": "4"}, "rank not known for 'env://'"),
        (
            (1, 0, "tcp://127.0.0.1:1", 0, "glooo"),
            {},
            "has no backend 'glooo'; available here: gloo",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ParallelConfigError, match=message):
        init_distributed_environment(*arguments)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": timedelta(seconds=99)}, "already has timeout=.*seconds=15"),
        ({"device": "cuda:3"}, "already has device='cpu'"),
        ({"local_rank": 5}, "already has local_rank=0"),
        ({"distributed_init_method": "http://x"}, "'http://x' is no known method"),
        ({"timeout": 5}, r"is no positive datetime\.timedelta"),
    ],
)
def test_a_second_init_that_contradicts_the_first_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    world = init_distributed_environment(timeout=TIMEOUT, device="cpu")
    with pytest.raises(ParallelConfigError, match=message):
        init_distributed_environment(**arguments)
    assert init_distributed_environment(timeout=TIMEOUT, local_rank=0, device="cpu") is world


@pytest.fixture
def two_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


@pytest.mark.usefixtures("two_accelerators")
def test_gloo_needs_no_accelerator_for_each_local_rank() -> None:
    assert init_distributed_environment(local_rank=7, backend="gloo").device.type == "cpu"


@pytest.mark.usefixtures("two_accelerators")
def test_a_device_without_a_known_backend_works_alone() -> None:
    assert init_distributed_environment().world_size == 1
    assert initialize_model_parallel().backend == "gloo"
