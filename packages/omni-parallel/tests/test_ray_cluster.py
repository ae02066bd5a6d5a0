"""Ranks that Ray places: a real Ray on this host, one for each test, that is gone afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("diffusers")
from PIL import Image

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_parallel.demo.pipeline import MODEL
from omni_parallel.launching.ray_cluster import _variables, ray_cluster

CLI = "from omni_parallel.cli import main; main()"
REQUEST = [
    "generate", str(MODEL), "--prompt", "a red circle left of a blue square", "--size", "64",
    "--steps", "3", "--guidance", "3", "--negative-prompt", "", "--json",
]  # fmt: skip
TIMEOUT_S = 110
RANKS = """
import os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist


def work(folder, what):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    Path(folder, f"rank{rank}").write_text(str(os.getpid()))
    if what == "raise" and rank == 1:
        raise ValueError("the odd one")
    if what == "sum":
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        return total.item(), os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    if rank == 0:
        dist.barrier()
    time.sleep(600)
"""
DRIVER = """
import json, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from omni_parallel.launching import ray_cluster as module
from ranks_on_ray import work

folder, what, ranks = [*sys.argv[1:], "2"][:3]
module.PLACEMENT_SECONDS = 10
try:
    with module.ray_cluster(2) as cluster:
        found = cluster.run(work, (folder, what), int(ranks), "cpu")
        print(json.dumps(found))
except KeyboardInterrupt:
    print("interrupted")
"""


def environment(folder: Path) -> dict[str, str]:
    (folder / "ranks_on_ray.py").write_text(RANKS)
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    found.pop("RAY_ADDRESS", None)
    return found


@contextmanager
def driven(folder: Path, *command: str) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """A process that uses Ray, and whatever it starts, which has to end with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(folder),
    )
    everyone: list[Any] = []
    try:
        yield process, everyone
        _, alive = psutil.wait_procs(everyone, timeout=30)
        assert alive == []
    finally:
        process.kill()
        process.communicate()
        for each in everyone:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def at_work(folder: Path, process: subprocess.Popen[str], everyone: list[Any]) -> list[int]:
    """Wait until both ranks are; gives the ids of their processes."""
    files = [folder / "rank0", folder / "rank1"]
    end = time.monotonic() + 90
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    everyone += psutil.Process(process.pid).children(recursive=True)
    return [int(file.read_text()) for file in files]


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as found:
        return torch.frombuffer(
            bytearray(found.convert("RGB").tobytes()), dtype=torch.uint8
        ).short()


@pytest.mark.slow
def test_ray_makes_the_image_of_one_process(tmp_path: Path) -> None:
    outs = tmp_path / "ray.png", tmp_path / "alone.png"
    ways = (["--launcher", "ray", "--layout", "ulysses=2,vae_patch=2"], ["--nproc", "1"])
    for out, options in zip(outs, ways, strict=True):
        done = subprocess.run(
            [sys.executable, "-c", CLI, *REQUEST, *options, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=environment(tmp_path),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout)
        assert found["files"] == [str(out)]
        assert found["ranks"] == len(options) // 2
    assert pixels(outs[0]).float().std() > 1
    assert (pixels(outs[0]) - pixels(outs[1])).abs().max() <= 1


def test_every_rank_has_its_place(tmp_path: Path) -> None:
    with driven(tmp_path, DRIVER, str(tmp_path), "sum") as (process, _):
        said, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
        assert json.loads(said) == {"0": [3.0, "0", "2"], "1": [3.0, "1", "2"]}


def test_the_first_to_fail_is_named_with_its_traceback_and_all_end(tmp_path: Path) -> None:
    with driven(tmp_path, DRIVER, str(tmp_path), "raise") as (process, everyone):
        at_work(tmp_path, process, everyone)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert "RankFailedError: rank 1 was the first to fail (all ranks have ended)" in errors
        assert "ValueError: the odd one" in errors


def test_a_killed_rank_is_named_and_all_end(tmp_path: Path) -> None:
    with driven(tmp_path, DRIVER, str(tmp_path), "sleep") as (process, everyone):
        ranks = at_work(tmp_path, process, everyone)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert time.monotonic() - killed < 30
        assert process.returncode == 1
        assert "RankFailedError: rank 1 was the first to fail: its process died" in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_ends_ranks_and_ray(tmp_path: Path, number: signal.Signals) -> None:
    with driven(tmp_path, DRIVER, str(tmp_path), "sleep") as (process, everyone):
        at_work(tmp_path, process, everyone)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # what a terminal does: to the whole group
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=TIMEOUT_S)
        assert said == "interrupted\n", errors


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a cluster with two CPUs, that lives as long as the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    process = subprocess.Popen(
        [*ray, f"--port={port}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(tmp_path), "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"},
    )
    everyone: list[psutil.Process] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        assert process.poll() is None
        yield f"127.0.0.1:{port}"
        assert process.poll() is None
    finally:
        everyone += psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.communicate(timeout=30)
        for each in psutil.wait_procs(everyone, timeout=30)[1]:
            each.kill()


@pytest.mark.slow
def test_a_cluster_that_is_there_is_used_and_stays(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for ranks in ("2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, str(tmp_path), "sum", ranks],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env={**environment(tmp_path), "RAY_ADDRESS": address},
        )
        if ranks == "2":
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"0": [3.0, "0", "2"], "1": [3.0, "1", "2"]}
        else:
            assert "no room for 3 ranks within 10 s: each needs 1 CPU, here are 2 CPU (" in (
                done.stderr
            )


def test_an_address_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free.getsockname()[1]}")
        cluster = ray_cluster(2)
        with pytest.raises(ParallelError, match=r"no Ray cluster at RAY_ADDRESS=127.*legal: HOST"):
            cluster.__enter__()


def test_a_rank_with_an_accelerator_sees_no_other() -> None:
    places = [("a", "10.0.0.1", 7001), ("b", "10.0.0.2", 7002), ("a", "10.0.0.1", 7003)]
    for alone, local in ((True, ["0", "0", "0"]), (False, ["0", "0", "1"])):
        found = _variables(places, alone)
        assert [one["LOCAL_RANK"] for one in found] == local
        assert [one["LOCAL_WORLD_SIZE"] for one in found] == ["2", "1", "2"]
        assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found} == {("10.0.0.1", "7001")}


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    cluster = ray_cluster(2)
    with pytest.raises(ParallelConfigError, match=r"pip install 'omni-parallel\[ray\]'"):
        cluster.__enter__()
