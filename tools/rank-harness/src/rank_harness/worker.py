"""The child side: a rank process that serves one task after the other."""

from __future__ import annotations

import contextvars
import faulthandler
import gc
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from rank_harness.clean import CleanState
from rank_harness.lifetime import end_with_parent
from rank_harness.wire import READY, Answer, Task, pack_exception, pack_value, unpack

_HERE = os.path.dirname(__file__)


def serve(connection: Connection, stdout: str, stderr: str, stack: str) -> None:
    """Perform tasks from the connection until it closes or sends None.

    For each task: the answer goes out, a rank that returned waits for the release, the
    process is cleaned, and `READY` goes out.

    Args:
        connection: The rank's end of the pipe.
        stdout: File that takes standard output.
        stderr: File that takes standard error and the stacks of a crash.
        stack: File that takes the stacks of all threads on SIGUSR1.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pool to act on
    _redirect(stdout, stderr)
    faulthandler.enable()
    # Kept open for the life of the process: the signal handler writes to it.
    stack_file = open(stack, "a", encoding="utf-8")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    gc.freeze()  # torch's objects need no look at each collection: 50 ms less per run
    clean = CleanState()
    clean.restore()
    try:
        connection.send(READY)
        while (task := connection.recv()) is not None:
            _serve_one(connection, task)
            clean.restore()
            _save_coverage()
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(READY)
    except (EOFError, OSError):
        return  # the pool is gone


def _serve_one(connection: Connection, task: Task) -> None:
    answer = _answer(task)
    connection.send(answer)
    if answer.status == "ok":
        # A process group that closes early is an error to ranks still at work.
        connection.recv()


def _answer(task: Task) -> Answer:
    try:
        body = contextvars.copy_context().run(_perform, task)
    except BaseException as error:  # SystemExit and pytest's own outcomes are results too
        return Answer(
            status="raised",
            ended_at=time.monotonic(),
            traceback=_format(error),
            body=pack_exception(error),
        )
    return Answer(status="ok", ended_at=time.monotonic(), body=body)


def _perform(task: Task) -> bytes:
    os.environ.update(task.environment)
    sys.path[:] = task.sys_path
    if task.store is not None:
        _init_group(task, task.store)
    fn, args, kwargs, filters = unpack(task.call)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for entry in reversed(filters):
            entry.install()
        return pack_value(_call(fn, args, kwargs))


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _init_group(task: Task, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=FileStore(store, task.world_size),
        rank=task.rank,
        world_size=task.world_size,
        timeout=timedelta(seconds=task.group_timeout),
    )
    # A rank whose function ends at once must not close connections that others still make.
    dist.barrier()


def _format(error: BaseException) -> str:
    """Format the traceback from the test's own frames on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_HERE):
        frames = frames.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frames)))


def _redirect(stdout: str, stderr: str) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, descriptor)
        os.close(target)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # else the last lines of a crash are lost


def _save_coverage() -> None:
    """Write measured lines after every run, since a later fault test may kill the process."""
    if (coverage := sys.modules.get("coverage")) and (now := coverage.Coverage.current()):
        now.save()
