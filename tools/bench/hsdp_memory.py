"""The most that a process holds, with the pages of files and without."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Final, Self

from bench.hsdp_results import Peaks

_STATUS: Final = Path("/proc/self/status")
_CLEAR: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"  # of proc(5): the mark of the highest goes back to what is held now
_M_MMAP_THRESHOLD: Final = -3  # of malloc.h: what is larger goes back when it is freed
_THRESHOLD: Final = 2**20
_EVERY: Final = 0.001  # seconds


def return_what_is_freed() -> None:
    """Have glibc give large freed blocks back at once, as an accelerator's allocator reuses them.

    Else a peak would also be what was freed long before.
    """
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)


def _read(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Baseline:
    """What a process holds before it is measured."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.anonymous, self.resident = _read("RssAnon"), _read("VmRSS")


class Watch:
    """The most that is held within the block, beyond a baseline."""

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._most = 0

    def __enter__(self) -> Self:
        _CLEAR.write_text(_RESET_PEAK)
        self._most = _read("RssAnon")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._most = max(self._most, _read("RssAnon"))
        self._resident = _read("VmHWM")

    def peaks(self) -> Peaks:
        """Of the block, once it has ended."""
        before = self._baseline
        return Peaks(self._most - before.anonymous, self._resident - before.resident)

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY):
            self._most = max(self._most, _read("RssAnon"))
