"""Looking again and again, in a thread, while this one is kept busy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omni_parallel.launching.processes import POLL_SECONDS


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Call a function every `POLL_SECONDS` within the block."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(POLL_SECONDS):
            look()

    thread = threading.Thread(target=follow, name="look again", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
