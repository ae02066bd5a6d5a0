"""The parent's side of every benchmark: start the ranks, follow them, end them whatever happens.

The ranks are those of the tests' rank harness: one thread each, reused from case to case, and
ended with their parent, on an error and on Ctrl-C.
"""

from __future__ import annotations

import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import torch.distributed as dist

from rank_harness import RankFailure, RankPool

GROUP_TIMEOUT: Final = timedelta(minutes=5)
"""How long a collective may wait, which includes a peer's compilation."""
CASE_SECONDS: Final = 3600.0
"""After this long a rank counts as hung and is killed."""
_POLL_SECONDS: Final = 0.5  # following the ranks must not take time from them

ResultT = TypeVar("ResultT")


class BenchError(Exception):
    """A case whose ranks failed; the message says how."""


@dataclass(frozen=True)
class Progress:
    """Counts steps, on rank 0, for the parent to see."""

    path: Path

    def step(self, count: int = 1) -> None:
        """Note that this many more steps are done."""
        if os.environ.get("RANK", "0") == "0":
            with self.path.open("a") as file:
                file.write("." * count)

    def done(self) -> int:
        """Steps so far."""
        return self.path.stat().st_size if self.path.exists() else 0


class Harness:
    """Runs functions on ranks; a context manager that ends every rank.

    Args:
        on_step: Called now and then, from another thread, with the steps of the current call.
    """

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._pool = RankPool()
        self._on_step = on_step

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def run(
        self,
        function: Callable[..., ResultT],
        world_size: int,
        *args: Any,
    ) -> ResultT:
        """Call ``function(progress, ...)`` on every rank, without a process group.

        Returns:
            What rank 0 returned.

        Raises:
            BenchError: A rank raised, died or hung.
            KeyboardInterrupt: Ctrl-C; every rank has ended.
        """
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ranks take their filters from here
            progress = Progress(Path(folder) / "steps")
            with _following(progress, self._on_step):
                try:
                    answers: list[Any] = self._pool.run(
                        function,
                        progress,
                        *args,
                        world_size=world_size,
                        timeout=CASE_SECONDS,
                        init=False,
                    )
                except RankFailure as error:
                    raise BenchError(str(error)) from error
        result: ResultT = answers[0]
        return result


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo group over all ranks, within the block, in a function that `Harness.run` calls."""
    dist.init_process_group("gloo", init_method="env://", timeout=GROUP_TIMEOUT)
    try:
        dist.barrier()
        yield
        dist.barrier()  # nobody closes a connection that another rank still uses
    finally:
        dist.destroy_process_group()


@contextmanager
def _following(progress: Progress, on_step: Callable[[int], None]) -> Iterator[None]:
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_SECONDS):
            on_step(progress.done())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        on_step(progress.done())
