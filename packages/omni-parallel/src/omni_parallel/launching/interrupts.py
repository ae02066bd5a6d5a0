"""Who hears of Ctrl-C: the launcher, which ends its ranks, and never a rank itself.

A terminal sends SIGINT to the launcher and to every rank at once. A rank that took it would raise
KeyboardInterrupt wherever it happened to be: while it imports, or after torch has given its output
back to the terminal, where Python prints a traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Interrupts:
    """While this is entered, a signal that ends a process raises KeyboardInterrupt, once.

    Once, because what follows the first one ends the ranks, which must not be interrupted in turn.
    Signals that are ignored, as by nohup, stay ignored. Python runs handlers in the main thread
    alone: entered in another one, this leaves the signals as they are.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._held = False
        self._came = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start processes in here: they never see SIGINT, and none is lost sight of.

        A signal that comes meanwhile raises at the end, when the caller knows what it started.
        """
        # The tracker of multiprocessing, if it starts only later, takes SIGINT off the mask again.
        resource_tracker.ensure_running()
        self._held = True
        # New processes inherit the mask. Ignoring the signal instead would lose a Ctrl-C.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._held = False
            if self._came:
                raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        first, self._came = not self._came, True
        if first and not self._held:
            raise KeyboardInterrupt


def end_with_launcher() -> None:
    """Make this process, which the launcher started, end when the launcher does and no earlier.

    torch asks the kernel for a SIGINT when the launcher dies; a rank that takes none needs another
    way to hear of it, also where the launcher is killed and can say nothing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def follow() -> None:
        launcher.join()
        os._exit(1)  # the main thread may be waiting for a rank that has ended already

    threading.Thread(target=follow, name="end with launcher", daemon=True).start()
