"""A script on several ranks: rank 0 has the terminal, the others have files."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_group_coordinator import ParallelConfigError
from omni_parallel.launching.failures import RankFailedError, first_failure, last_words
from omni_parallel.launching.processes import Nodes, run_ranks
from omni_parallel.run.first_words import FirstWords
from omni_parallel.v1.application import LAYOUT_VARIABLE

_ABOVE = "(what it said is above)"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class ScriptRun:
    """A script and how it is run."""

    script: Path
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    """On this host."""
    layout: str | None = None
    """What `parallelize` takes where the script names no configuration."""
    nodes: Nodes = field(default_factory=Nodes)
    log_dir: Path | None = None
    """Where what the ranks print is kept; None: thrown away at the end."""
    everything: bool = False
    """Whether all ranks have the terminal."""
    captured: bool = False
    """Whether what rank 0 prints is returned instead of shown."""


def run_script(run: ScriptRun) -> str:
    """Run a script on several ranks, each a process with the variables that torchrun sets.

    Returns:
        What the first rank of this host printed, where that is captured.

    Raises:
        RankFailedError: A rank failed; the message holds the end of what the first one printed.
        ParallelConfigError: No rank was started, as there is no such endpoint or folder.
        KeyboardInterrupt: The run was interrupted; every rank has ended.
    """
    with ExitStack() as stack:
        if run.log_dir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-parallel-"))
        else:
            folder = _made(run.log_dir)
        words = FirstWords(Path(folder))
        try:
            with words.shown():
                _start(run, folder)
        except ChildFailedError as error:
            rank, _ = error.get_first_failure()
            raise RankFailedError(rank, _message(error, run, words)) from None
        words.release()
        first = words.of_rank(0)
        if not run.captured or first is None:
            return ""
        return (first / "stdout.log").read_text(errors="replace")


def _made(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        msg = f"--log-dir {folder}: {error.strerror}; legal: a folder that can be written to"
        raise ParallelConfigError(msg) from error
    return str(folder)


def _start(run: ScriptRun, folder: str) -> None:
    redirects = dict.fromkeys(range(1, run.ranks), Std.ALL) | {
        0: Std.ALL if run.captured else Std.ERR
    }
    logs = DefaultLogsSpecs(folder, redirects=Std.NONE if run.everything else redirects)
    args = (str(run.script), *run.arguments)
    environment = _environment(run)
    run_ranks(sys.executable, args, run.ranks, logs, nodes=run.nodes, environment=environment)


def _environment(run: ScriptRun) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {_THREADS: os.environ.get(_THREADS, str(max(1, (cores or 1) // run.ranks)))}
    found["PYTHONUNBUFFERED"] = "1"  # so that files hold what a rank printed before it was ended
    if run.layout is not None:
        found[LAYOUT_VARIABLE] = run.layout
    return found


def _message(error: ChildFailedError, run: ScriptRun, words: FirstWords) -> str:
    _, failure = error.get_first_failure()
    folder, of_rank_0 = words.of_rank(failure.local_rank), words.rest().strip()
    said = "" if folder is None else last_words(folder)
    if failure.local_rank == 0 and not run.captured:
        said = of_rank_0 or (_ABOVE if words.any_shown else "(it printed no error)")
    parts = [first_failure(error, _ABOVE if run.everything else said or "(it printed nothing)")]
    if not run.everything and failure.local_rank != 0 and of_rank_0:
        parts.append(f"rank 0 had to end too:\n{of_rank_0}")
    if run.log_dir is not None:
        parts.append(f"what every rank printed: {run.log_dir}")
    return "\n\n".join(parts)
