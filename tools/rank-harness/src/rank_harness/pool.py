"""The parent side: a pool of rank processes that runs functions on N ranks."""

from __future__ import annotations

import atexit
import itertools
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rank_harness.outcome import Outcome, RankFailure
from rank_harness.process import STOP_S, RankProcess, start_fork_server
from rank_harness.run import perform
from rank_harness.wire import Task, pack_call

HOST = "127.0.0.1"
GROUP_TIMEOUT_S = 30.0
"""Longest wait of a collective of the default group, in seconds."""
GROUP_TIMEOUT_SHARE = 0.8
"""Same, as a share of the run's timeout: a deadlock is to raise before the ranks are killed."""


class RankPool:
    """Runs functions on N gloo ranks, one process each, that are reused from run to run.

    In each rank, `fn(*args, **kwargs)` is called with `RANK`, `LOCAL_RANK`, `WORLD_SIZE`,
    `MASTER_ADDR` and `MASTER_PORT` in the environment, one thread, fixed seeds and the
    caller's warning filters. `fn`, its arguments and its result are pickled by cloudpickle.

    Parameters of `run` and `outcomes`:

    - `world_size`: number of ranks.
    - `timeout`: seconds until a rank that has not returned is hung, and killed.
    - `init`: make a gloo default process group over the ranks. Its collectives give up after
      30 s or 0.8 of `timeout`, whichever is shorter. Without it, `MASTER_PORT` is free for
      `torch.distributed.init_process_group("gloo", init_method="env://")`.
    - `env`: variables to add for this run.

    After the run the process groups are destroyed and the process is put back into its first
    state. What a function patches in an imported module stays, unless it undoes that itself.
    A rank that died or hung is replaced at the next run.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rank-harness-")
        self._processes: list[RankProcess] = []
        self._files = Path(self._folder.name)
        self._generations = itertools.count()
        atexit.register(self.close)  # before multiprocessing's own, which waits for ever

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        init: bool = True,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call a function on every rank and give back what each returned, by rank.

        Raises:
            RankFailure: A rank raised, died or hung.
            TypeError, pickle.PicklingError: The function or an argument cannot be pickled.
            RuntimeError: A rank process cannot be started.
        """
        __tracebackhide__ = True
        outcomes = self.outcomes(
            fn, *args, world_size=world_size, timeout=timeout, init=init, env=env, **kwargs
        )
        if any(outcome.status != "ok" for outcome in outcomes):
            raise RankFailure(outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        world_size: int = 2,
        timeout: float = 60.0,
        init: bool = True,
        env: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> list[Outcome]:
        """Call a function on every rank and give back what became of each, by rank.

        Raises:
            TypeError, pickle.PicklingError: The function or an argument cannot be pickled.
            RuntimeError: A rank process cannot be started.
        """
        call = pack_call(fn, args, kwargs)
        processes = self._ready(world_size)
        # A new file each run, so that no key of an earlier run is seen.
        store = str(self._files / f"store-{next(self._generations)}") if init else None
        with _free_port() as port:
            tasks = [
                Task(
                    call=call,
                    environment={**_torchrun_environment(rank, world_size, port), **(env or {})},
                    rank=rank,
                    world_size=world_size,
                    store=store,
                    group_timeout=min(timeout * GROUP_TIMEOUT_SHARE, GROUP_TIMEOUT_S),
                    sys_path=list(sys.path),
                )
                for rank in range(world_size)
            ]
            outcomes = perform(processes, tasks, timeout)
        _echo(outcomes)
        return outcomes

    def pids(self) -> list[int]:
        """Give the process ids of the ranks that are alive, by rank."""
        return [p.pid for p in self._processes if p.pid is not None and p.alive()]

    def close(self) -> None:
        """End all ranks: idle ones by themselves, so that they can write coverage data."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.send(None)
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            process.join_or_kill(deadline)
        self._processes.clear()
        self._folder.cleanup()

    def _ready(self, world_size: int) -> list[RankProcess]:
        """Give that many idle ranks; start the missing ones, all at the same time."""
        start_fork_server()
        started = []
        for rank in range(world_size):
            if rank < len(self._processes) and self._processes[rank].alive():
                continue
            process = RankProcess(rank, self._files)
            started.append(process)
            self._processes[rank : rank + 1] = [process]
        for process in started:
            process.await_ready()
        return self._processes[:world_size]


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }


@contextmanager
def _free_port() -> Iterator[int]:
    """Keep a port for the ranks: bound, so that nobody else is given it, but not listening.

    With SO_REUSEADDR on both sides a rank can still listen on it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def _echo(outcomes: Sequence[Outcome]) -> None:
    """Pass on what the ranks wrote, for pytest to show or capture."""
    for outcome in outcomes:
        for text, stream in ((outcome.stdout, sys.stdout), (outcome.stderr, sys.stderr)):
            for line in text.splitlines():
                stream.write(f"[rank {outcome.rank}] {line}\n")
