"""Run a function in several processes with torch's elastic agent; all of them end with it."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from omni_parallel.demo.interrupts import Interrupts

POLL_SECONDS = 0.1
_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_THREADS = "OMP_NUM_THREADS"


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
    # What the agent logs of a failure is in the error that this raises.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torch's handlers would raise in the midst of starting processes, and stay after the run.
    # Ranks take their number of threads from the environment, before they import torch.
    with Interrupts() as interrupts, _environment({_SIGNALS: "", _THREADS: "1"}):
        rendezvous = get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint="localhost:0",
                run_id=uuid.uuid4().hex,
                min_nodes=1,
                max_nodes=1,
                timeout=60,
            )
        )
        spec = WorkerSpec(
            role="demo",
            local_world_size=count,
            entrypoint=function,
            args=args,
            rdzv_handler=rendezvous,
            max_restarts=0,
            monitor_interval=POLL_SECONDS,
        )
        logs = DefaultLogsSpecs(log_dir=folder, redirects=Std.ALL)
        try:
            result = _Agent(spec, logs, interrupts).run()
        finally:
            rendezvous.shutdown()
    if result.is_failed():
        raise ChildFailedError(function.__name__, result.failures)
    returned: dict[int, Any] = result.return_values
    return returned


class _Agent(LocalElasticAgent):
    """Whatever ends `run`, it ends the processes first, with a SIGTERM, which they don't handle."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, interrupts: Interrupts) -> None:
        super().__init__(spec, logs, start_method="spawn")
        self._interrupts = interrupts

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self._interrupts.held():
            started: dict[int, Any] = super()._start_workers(worker_group)
        return started


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
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
