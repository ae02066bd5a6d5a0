"""The ranks that generate end, whatever happens to one of them or to the command."""

from __future__ import annotations

import os
import re
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

from omni_parallel.demo.pipeline import MODEL

CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from omni_parallel.cli import main
main()
"""
PATIENCE_S = 60.0
pytestmark = pytest.mark.slow


@contextmanager
def endless(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A run on two ranks that would take minutes, and its rank processes, at work."""
    options = ["--prompt", "a red circle", "--steps", "1000", "--size", "256", "--nproc", "2"]
    options += ["--layout", "ulysses=2", "--out", str(folder / "a.png")]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "generate", str(MODEL), *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
    )
    try:
        assert process.stderr is not None
        said = b""
        while not re.search(rb"\b[1-9]\d*/1000", said):  # the progress of the first rank
            more = os.read(process.stderr.fileno(), 4096)
            assert more, said
            said += more
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, ranks):
        assert len(ranks) == 2
        killed = time.monotonic()
        ranks[1].kill()
        _, said = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - killed < 30
        assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert process.returncode == 1
    assert b"rank 1 was the first to fail by signal 9 (SIGKILL)" in said
    assert b"Traceback" not in said.rpartition(b"error: rank 1")[2]


def test_ctrl_c_ends_every_rank_and_says_so(tmp_path: Path) -> None:
    with endless(tmp_path) as (process, ranks):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert process.returncode == 130
    assert b"interrupted; every rank has ended" in said
    assert b"Traceback" not in said
    assert not (tmp_path / "a.png").exists()
    assert not list(tmp_path.glob("omni-parallel-*"))
