"""Count of what this rank sends, by arithmetic, for tests and reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Traffic:
    """Bytes and calls of one recording, by operation.

    Attributes:
        bytes_sent: Bytes that this rank handed to its peers, without what it keeps itself. For
            reductions, whose algorithm belongs to the backend, the volume of a ring algorithm.
        calls: How often each operation ran.
    """

    def __init__(self) -> None:
        self.bytes_sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total_bytes(self) -> int:
        """Bytes sent by all operations together."""
        return sum(self.bytes_sent.values())

    @property
    def total_calls(self) -> int:
        """Number of operations of every kind."""
        return sum(self.calls.values())

    def _add(self, operation: str, sent: int) -> None:
        self.bytes_sent[operation] += sent
        self.calls[operation] += 1


_recordings: ContextVar[tuple[Traffic, ...]] = ContextVar("omni_traffic", default=())


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Count what this rank sends within the block; recordings nest.

    Headers of tensor dicts count as ``"metadata"``. What torch.compile has traced is not seen:
    a compiled region runs without Python.
    """
    traffic = Traffic()
    token = _recordings.set((*_recordings.get(), traffic))
    try:
        yield traffic
    finally:
        _recordings.reset(token)


def count(operation: str, sent: int) -> None:
    """Add one operation that sends this many bytes to every recording that is open."""
    for traffic in _recordings.get():
        traffic._add(operation, sent)
