"""A signal ends the launcher and, through it, its processes, which print nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from omni_parallel.launching.interrupts import SIGNALS, Interrupts

PATIENCE_S = 60.0
SCRIPT = """
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # Where the tests run in the background, or under nohup, some of them are ignored.
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

Path(sys.argv[1], str(os.getpid())).touch()

from omni_parallel.launching.interrupts import end_with_launcher
from omni_parallel.launching.processes import run_processes


def wait(folder):
    end_with_launcher()
    Path(folder, f"waits{os.getpid()}").touch()
    time.sleep(600)


if __name__ == "__main__":
    try:
        run_processes(wait, (sys.argv[1],), 2, sys.argv[1])
    except KeyboardInterrupt:
        print("interrupted")
"""


@contextmanager
def launched(folder: Path, files: str, count: int) -> Iterator[subprocess.Popen[str]]:
    """A launcher of two processes, once so many of the files of the script are there."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while len(list(folder.glob(files))) < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no process started"
            time.sleep(0.02)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("files", "count"), [("[0-9]*", 3), ("waits*", 2)], ids=["while they import", "at work"]
)
def test_ctrl_c_prints_nothing_of_the_processes(tmp_path: Path, files: str, count: int) -> None:
    with launched(tmp_path, files, count) as process:
        everyone = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT)  # whoever presses it once presses it twice
        assert process.communicate(timeout=PATIENCE_S)[0] == "interrupted\n"
        assert not psutil.wait_procs(everyone, timeout=30)[1]


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL], ids=lambda number: number.name)
def test_processes_end_with_the_launcher(tmp_path: Path, number: signal.Signals) -> None:
    with launched(tmp_path, "waits*", 2) as process:
        everyone = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)  # to the launcher alone
        output = process.communicate(timeout=PATIENCE_S)[0]
        if number != signal.SIGKILL:  # where Python's tracker reports the launcher's semaphores
            assert output == "interrupted\n"
        assert not psutil.wait_procs(everyone, timeout=30)[1]


def test_a_signal_interrupts_once_and_the_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_held_signal_interrupts_at_the_end() -> None:
    done = []

    def start() -> None:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            done.append("started")

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert done == ["started"]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_than_the_first_leaves_the_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Interrupts() as interrupts, interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
