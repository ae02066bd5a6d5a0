"""What rank 0 says as errors, shown as it comes, but for a traceback that another rank caused."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from omni_parallel.launching.looking import looking

HOLD_SECONDS = 5.0
"""How long a traceback is held back while ranks go on: the agent needs less to see one fail."""
_BEGIN = "Traceback (most recent call last)"


class FirstWords:
    """Shows what is written to a file, and holds a traceback back.

    When one rank fails, the others raise too, of the connection that broke, and often earlier than
    the one that failed has written why. So that its words come first, a traceback waits.

    Args:
        folder: In which the agent makes the file, ``*/attempt_0/0/stderr.log``.
        stream: Where it is shown; default: standard error.
    """

    def __init__(self, folder: Path, stream: TextIO | None = None) -> None:
        self._folder = folder
        self._stream = sys.stderr if stream is None else stream
        self._known = set(folder.iterdir())
        self._held: str = ""
        self.any_shown = False
        """Whether anything was shown."""
        self._since = 0.0
        self._at = 0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show within the block; what is held back at its end stays so until `rest`."""
        try:
            with looking(self._read):
                yield
        finally:
            self._read()

    def rest(self) -> str:
        """What was held back, which is shown no more."""
        held, self._held = self._held, ""
        return held

    def release(self) -> None:
        """Show what was held back."""
        self._show(self.rest())

    def of_rank(self, rank: int) -> Path | None:
        """The folder of a rank of this host, once the agent has made it."""
        new = set(self._folder.iterdir()) - self._known
        return next((folder / "attempt_0" / str(rank) for folder in new), None)

    def _read(self) -> None:
        text = self._held + self._new()
        begin = text.find(_BEGIN)
        if begin < 0:
            self._held = ""
            self._show(text)
            return
        line = text.rfind("\n", 0, begin) + 1
        self._show(text[:line])
        if not self._held:
            self._since = time.monotonic()
        self._held = text[line:]
        if time.monotonic() - self._since > HOLD_SECONDS:
            self.release()

    def _new(self) -> str:
        folder = self.of_rank(0)
        if folder is None:
            return ""
        with suppress(FileNotFoundError), (folder / "stderr.log").open("rb") as file:
            file.seek(self._at)
            found = file.read()
            self._at += len(found)
            return found.decode(errors="replace")
        return ""

    def _show(self, text: str) -> None:
        if text:
            self.any_shown = self.any_shown or not text.isspace()
            self._stream.write(text)
            self._stream.flush()
