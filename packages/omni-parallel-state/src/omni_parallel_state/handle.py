"""What every strategy gives back when it is applied: the way to undo it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self


class Handle:
    """Undoes a strategy on its model; also a context manager that does so at its end.

    Args:
        undo: Called once, by the first `remove`.
    """

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    @property
    def removed(self) -> bool:
        """Whether the model is as it was before."""
        return self._undo is None

    def remove(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
