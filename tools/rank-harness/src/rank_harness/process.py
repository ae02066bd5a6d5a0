"""The parent side of one rank process: its start, its pipe, its files and its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from rank_harness.wire import READY

START_S = 120.0
"""Seconds that a process may take from its start to its first `READY`."""
STACK_S = 2.0
"""Seconds that a hung process has to write its stacks."""
STOP_S = 10.0
"""Seconds that an idle process has to end by itself when told to."""

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["rank_harness.worker", "rank_harness.forkserver_setup", "pytest"]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # The compiler's own pool of processes would be one for each rank.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
if sys.platform == "linux":
    # Else gloo looks up the host's name for each group, which takes as long as the resolver does.
    _ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"


def start_fork_server() -> None:
    """Start the server that the ranks are forked from; nothing happens if it runs already."""
    _CONTEXT.set_forkserver_preload(_PRELOAD)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        forkserver.ensure_running()


class RankProcess:
    """A started rank process."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.connection, theirs = _CONTEXT.Pipe()
        base = f"{folder}/rank{rank}-{time.monotonic_ns()}"
        self._files = {name: Path(f"{base}.{name}") for name in ("stdout", "stderr", "stack")}
        self._process = _CONTEXT.Process(
            target=_serve, args=(theirs, *map(str, self._files.values())), daemon=True
        )
        self._process.start()
        theirs.close()
        self._marks = dict.fromkeys(self._files, 0)

    @property
    def sentinel(self) -> int:
        """A handle that becomes ready when the process has ended."""
        return self._process.sentinel

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    def alive(self) -> bool:
        """Tell whether the process still runs."""
        return self._process.is_alive()

    def await_ready(self) -> None:
        """Wait for the first `READY`.

        Raises:
            RuntimeError: The process ended, or took more than `START_S` seconds.
        """
        with suppress(EOFError, OSError):
            if self.connection.poll(START_S) and self.connection.recv() == READY:
                return
        self.kill()
        msg = f"rank {self.rank} did not start:\n{self.written('stderr')}"
        raise RuntimeError(msg)

    def send(self, message: Any) -> None:
        """Send a message; a process that is gone is noticed by its sentinel, not here."""
        with suppress(OSError):
            self.connection.send(message)

    def mark(self) -> None:
        """Let `written` begin at what is written from now on."""
        for name, path in self._files.items():
            self._marks[name] = path.stat().st_size if path.exists() else 0

    def written(self, name: str) -> str:
        """Read what came into the file `stdout`, `stderr` or `stack` since the mark."""
        path = self._files[name]
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(self._marks[name])
            return file.read().decode(errors="replace")

    def ask_for_stack(self) -> None:
        """Ask for the stacks of all threads; a process stuck in C++ answers too."""
        if self.pid is not None and self.alive():
            os.kill(self.pid, signal.SIGUSR1)
            os.kill(self.pid, signal.SIGCONT)  # a stopped process acts on no signal

    def read_stack(self, deadline: float) -> str:
        """Read the stacks once they are complete, or what is there at the deadline."""
        before, text = "", self.written("stack")
        while time.monotonic() < deadline and (not text or text != before):
            time.sleep(0.02)
            before, text = text, self.written("stack")
        return text

    def exit_code(self) -> int | None:
        """Give the exit code of a process that has ended or is about to."""
        self._process.join(STOP_S)
        return self._process.exitcode

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join(STOP_S)
        self.connection.close()

    def join_or_kill(self, deadline: float) -> None:
        """Give a process that was told to stop until the deadline, then kill it."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        self.kill()


def _serve(connection: Connection, stdout: str, stderr: str, stack: str) -> None:
    # torch is loaded in the rank, so that starting pytest does not wait for it.
    from rank_harness.worker import serve

    serve(connection, stdout, stderr, stack)
