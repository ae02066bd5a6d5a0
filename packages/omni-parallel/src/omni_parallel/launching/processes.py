"""Run a function or a script in several processes with torch's elastic agent; all end with it."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_parallel.launching.interrupts import Interrupts
from omni_parallel.launching.meeting import gloo_variables, meeting

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 10
"""How long ranks that a signal asked to end have, before they are killed."""
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Nodes:
    """The hosts of a run, each of which starts as many ranks."""

    count: int = 1
    endpoint: str = "localhost:0"
    """``host:port`` of the one that the others meet at; port 0: any that is free."""
    run_id: str = ""
    """The same on all hosts; default: one of its own."""


def run_processes(
    function: Callable[..., Any], args: tuple[object, ...], count: int, folder: str
) -> dict[int, Any]:
    """Call a function in several processes; what they print goes to files in the folder.

    Args:
        function: Importable; it calls `end_with_launcher` first.
        args: Its arguments, the same in every process.
        count: Number of processes.
        folder: For what the processes print and for their errors.

    Returns:
        What each process returned, by rank.

    Raises:
        ChildFailedError: A process failed; every one has ended.
        KeyboardInterrupt: A signal came, to end this process; every process has ended.
    """
    logs = DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL)
    # Ranks take their number of threads from the environment, before they import torch.
    return run_ranks(function, args, count, logs, environment={_THREADS: "1"})


def run_ranks(
    entrypoint: Callable[..., Any] | str,
    args: tuple[object, ...],
    count: int,
    logs: LogsSpecs,
    *,
    nodes: Nodes | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[int, Any]:
    """Run a function, or a program, in several processes.

    Args:
        entrypoint: A function as of `run_processes`, or the path of a program.
        args: Its arguments, the same in every process.
        count: Number of processes on this host.
        logs: Where what they print goes.
        nodes: The hosts; default: this one alone.
        environment: Variables of the processes beside those of this one.

    Returns:
        What each process returned, by rank; of a program, nothing.

    Raises:
        ChildFailedError: A process failed; every one has ended.
        KeyboardInterrupt: A signal came, to end this process; every process has ended.
    """
    # What the agent logs of a failure is in the error that this raises.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    nodes = Nodes() if nodes is None else nodes
    # torch's handlers would raise in the midst of starting processes, and stay after the run.
    variables = {_SIGNALS: "", **gloo_variables(nodes.endpoint), **(environment or {})}
    with Interrupts() as interrupts, _environment(variables):
        rendezvous = meeting(nodes.endpoint, nodes.run_id or uuid.uuid4().hex, nodes.count)
        spec = WorkerSpec(
            role="rank",
            local_world_size=count,
            entrypoint=entrypoint,
            args=args,
            rdzv_handler=rendezvous,
            max_restarts=0,
            monitor_interval=POLL_SECONDS,
        )
        try:
            result = _Agent(spec, logs, interrupts).run()
        finally:
            rendezvous.shutdown()
    if result.is_failed():
        name = entrypoint if isinstance(entrypoint, str) else entrypoint.__name__
        raise ChildFailedError(name, result.failures)
    returned: dict[int, Any] = result.return_values
    return returned


class _Agent(LocalElasticAgent):
    """Whatever ends `run`, it ends the processes first, with a SIGTERM, which they don't handle."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, interrupts: Interrupts) -> None:
        super().__init__(spec, logs, start_method="spawn", shutdown_timeout=PATIENCE_SECONDS)
        self._interrupts = interrupts

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self._interrupts.held():
            started: dict[int, Any] = super()._start_workers(worker_group)
            self._hurry()
        return started

    def _hurry(self) -> None:
        """Have the agent wait less for ranks to end than its 30 seconds, which nothing changes.

        Checked on torch 2.13, where ``close(death_sig, timeout)`` of what holds the processes is
        called with a timeout by some and without by others.
        """
        context: Any = self._pcontext
        close = context.close

        def hurried(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            close(death_sig, min(timeout, PATIENCE_SECONDS))

        context.close = hurried


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
