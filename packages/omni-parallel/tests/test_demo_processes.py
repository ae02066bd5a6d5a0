"""The ranks of the demonstration end, whatever happens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("diffusers")

PATIENCE_S = 60.0
FOREGROUND = """
import signal

if __name__ == "__main__":
    # A shell has it ignored in what it runs in the background, maybe the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
"""
CLI = """
from omni_parallel.cli import main

if __name__ == "__main__":
    main()
"""
TWO_RANKS = """
from omni_parallel.demo.launch import launch
from omni_parallel.demo.request import DemoRequest
from omni_parallel.v1 import ParallelConfig

if __name__ == "__main__":
    launch(DemoRequest(steps=1000, width=256, height=256), ParallelConfig(ulysses=2), 2, print)
"""


@contextmanager
def endless(
    folder: Path, script: str, *options: str
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A run that would take minutes, and its rank processes, once they are at work."""
    file = folder / "script.py"
    file.write_text(FOREGROUND + script)
    process = subprocess.Popen(
        [sys.executable, str(file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        ranks_at_work(process, folder)
        yield process, rank_processes(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ranks_at_work(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until the first step is done."""
    deadline = time.monotonic() + PATIENCE_S
    while not list(folder.glob("omni-parallel-*/progress.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no rank started"
        time.sleep(0.1)


def rank_processes(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def all_end(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.parametrize(
    ("script", "options", "count"),
    [(CLI, ("demo", "--steps", "1000", "--size", "256"), 1), (TWO_RANKS, (), 2)],
    ids=["the command", "two ranks"],
)
def test_ctrl_c_ends_every_rank(
    tmp_path: Path, script: str, options: tuple[str, ...], count: int
) -> None:
    if options:
        options = (*options, "--out", str(tmp_path / "sheet.png"))
    with endless(tmp_path, script, *options) as (process, ranks):
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == count
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the whole group
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert all_end(everyone)
        assert not list(tmp_path.glob("omni-parallel-*")), "left its folder behind"
        if script == CLI:
            assert process.returncode == 130, output
            assert "interrupted" in output
            assert "Traceback" not in output
        else:
            assert "KeyboardInterrupt" in output
            assert "SpawnProcess" not in output, output


def test_ranks_leave_ctrl_c_to_the_launcher(tmp_path: Path) -> None:
    with endless(tmp_path, TWO_RANKS) as (process, ranks):
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        next(tmp_path.glob("omni-parallel-*/progress.json")).unlink()
        ranks_at_work(process, tmp_path)  # another step is done
        assert rank_processes(process) == ranks


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    with endless(tmp_path, TWO_RANKS) as (process, ranks):
        process.kill()
        assert all_end(ranks)


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    with endless(tmp_path, TWO_RANKS) as (process, ranks):
        everyone = psutil.Process(process.pid).children(recursive=True)
        ranks[1].kill()
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 1, output
        assert "RankFailedError: rank 1 was the first to fail by signal 9" in output
        assert all_end(everyone)
