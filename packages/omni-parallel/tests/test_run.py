"""``omni-parallel run``: every rank ends, and the first that failed has the first word."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from omni_parallel.run.command import run
from omni_parallel.run.first_words import FirstWords

CLI = "from omni_parallel.cli import main; main()"
SCRIPT = """
import os, signal, sys, time
import torch.distributed as dist

signal.signal(signal.SIGTERM, signal.SIG_DFL)
rank, what = int(os.environ["RANK"]), sys.argv[1]
print("rank", rank, "of", os.environ["WORLD_SIZE"], *sys.argv[2:], flush=True)
print("layout", os.environ.get("OMNI_PARALLEL_LAYOUT"), file=sys.stderr, flush=True)
if what == "sleep":
    time.sleep(600)
if what == "stubborn" and rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if what == "stubborn":
    time.sleep(1)
    open(sys.argv[2], "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
dist.init_process_group("gloo")
if what == "raise" and rank == 1:
    raise ValueError("the odd one")
if what == "kill" and rank == 1:
    time.sleep(1)
    open(sys.argv[2], "w").write(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def call(*arguments: object, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CLI, "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def ranks_of(script: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(script) in line and "run" not in line:
            found.append(process)
    return found


def test_rank_0_has_the_terminal_and_the_layout_comes_along(script: Path) -> None:
    done = call("--layout", "cfg=2", script, "go", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0 of 2 --steps 3\n"
    assert "layout cfg=2" in done.stderr


def test_one_json_object_and_nothing_else(script: Path) -> None:
    done = call("--nproc", 2, "--json", script, "go", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("seconds") > 0
    assert found.pop("version")
    assert found == {
        "command": "run",
        "passed": True,
        "error": None,
        "script": str(script),
        "arguments": ["go", "--json"],
        "layout": None,
        "ranks": 2,
        "output": "rank 0 of 2 --json\n",
    }
    assert "layout None" in done.stderr


def test_a_failure_is_a_json_object_that_names_the_rank(script: Path) -> None:
    done = call("--nproc", 3, "--json", script, "raise")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert not found["passed"]
    assert found["error"]["rank"] == 1
    assert "ValueError: the odd one" in found["error"]["message"]
    assert "ValueError: the odd one" in done.stderr


def test_all_output_shows_every_rank(script: Path) -> None:
    done = call("--nproc", 2, "--all-output", script, "go")
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_the_first_to_fail_has_the_first_word(script: Path) -> None:
    done = call("--nproc", 3, script, "raise")
    assert done.returncode == 1
    said = done.stderr
    assert said.index("rank 1 was the first to fail") < said.index("ValueError: the odd one")
    assert said.index("ValueError: the odd one") < said.index("rank 0 had to end too")
    assert said.count("rank 0 had to end too") == said.count("ValueError: the odd one") == 1
    assert ranks_of(script) == []


@pytest.mark.parametrize("what", ["kill", "stubborn"])
def test_a_killed_rank_is_named_and_the_others_end(script: Path, what: str) -> None:
    killed = script.parent / "killed"
    done = call("--nproc", 2, script, what, killed)
    assert time.time() - float(killed.read_text()) < 30
    assert done.returncode == 1
    assert "rank 1 was the first to fail by signal 9 (SIGKILL)" in done.stderr
    assert ranks_of(script) == []


def test_ctrl_c_ends_every_rank_and_says_so(script: Path) -> None:
    code = f"import signal; signal.signal(2, signal.default_int_handler); {CLI}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--nproc", "2", str(script), "sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "rank 0 of 2\n"
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; every rank has ended" in said
    assert "Traceback" not in said
    assert ranks_of(script) == []


def test_a_folder_keeps_what_ranks_print(script: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    done = call("--nproc", 2, "--log-dir", logs, script, "raise")
    assert f"what every rank printed: {logs}" in done.stderr
    (kept,) = logs.glob("*/attempt_0/1/stderr.log")
    assert "the odd one" in kept.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def", "SyntaxError"),
        ("import sys; sys.exit(3)", "with status 3 (all ranks have ended):\n(it printed no error)"),
    ],
)
def test_a_rank_that_ends_without_a_traceback(tmp_path: Path, text: str, said: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    done = call("--nproc", 1, script)
    assert done.returncode == 1
    assert said in done.stderr
    if text == "def":
        assert done.stderr.endswith("(all ranks have ended):\n(what it said is above)\n")
    found = json.loads(call("--nproc", 1, "--json", script).stdout)
    assert said.replace("no error", "nothing") in found["error"]["message"]


def test_two_hosts_meet_at_an_endpoint(script: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--rdzv-endpoint", f"localhost:{port}", "--nproc", "1"]
    found: list[subprocess.CompletedProcess[str]] = []
    hosts = [
        threading.Thread(target=lambda: found.append(call(*options, script, "go"))) for _ in "ab"
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert [done.returncode for done in found] == [0, 0], [done.stderr for done in found]
    assert sorted(done.stdout for done in found) == ["rank 0 of 2\n", "rank 1 of 2\n"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nproc", "2", "--layout", "ulysses=3"], "ulysses=3 does not divide the world of 2"),
        (["--layout", "warp=3"], "unknown: warp"),
        (["--nnodes", "2", "--nproc", "1"], "needs --rdzv-endpoint HOST:PORT"),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "a:1", "--layout", "ulysses=3"],
            "3 ranks of the layout on 2 hosts",
        ),
        (["--nproc", "0"], "0 is not in the range"),
        (["--nproc", "1", "--log-dir", "/dev/null/logs"], "--log-dir /dev/null/logs: "),
        (
            ["--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:abc"],
            "--rdzv-endpoint 127.0.0.1:abc: ",
        ),
        (["--nproc", "2", "--all-output", "--json"], "do not go together"),
    ],
)
def test_options_that_cannot_be(script: Path, options: list[str], said: str) -> None:
    result = CliRunner().invoke(run, [*options, str(script)])
    assert result.exit_code == 2
    assert said in result.output


def test_a_script_that_is_not_there() -> None:
    result = CliRunner().invoke(run, ["--nproc", "2", "none.py"])
    assert result.exit_code == 2
    assert "'none.py' does not exist" in result.output


def test_a_traceback_waits_and_other_words_do_not(tmp_path: Path, monkeypatch) -> None:
    shown = io.StringIO()
    words = FirstWords(tmp_path, shown)
    file = tmp_path / "run" / "attempt_0" / "0" / "stderr.log"
    file.parent.mkdir(parents=True)
    with words.shown():
        file.write_text("one\n[rank0]: Traceback (most recent call last):\n  odd\n")
        eventually(lambda: shown.getvalue() == "one\n")
        time.sleep(0.3)  # more than one look at the file
        assert shown.getvalue() == "one\n"
    assert words.rest().endswith("odd\n")
    monkeypatch.setattr("omni_parallel.run.first_words.HOLD_SECONDS", 0.2)
    with words.shown():
        with file.open("a") as more:
            more.write("Traceback (most recent call last):\n  caught\n")
        eventually(lambda: shown.getvalue().endswith("  caught\n"))
