"""Telling, in the place of a result, that there is none.

A rank whose work fails must not leave its peers in a collective, and a collective more in every
step, to ask whether all went well, would cost them all. So the rank sends as many bytes as it
would have sent, which begin with a mark.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MARK = bytes.fromhex("ff6e6f726573756c7421f3a90d5be7ff")  # 16 bytes that no result begins with
MARK_BYTES = len(_MARK)
"""A result of fewer bytes cannot be marked."""


def marked(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A mark in the place of a result of so many elements."""
    buffer = torch.zeros(elements * dtype.itemsize, dtype=torch.uint8)
    buffer[:MARK_BYTES] = torch.frombuffer(bytearray(_MARK), dtype=torch.uint8)
    return buffer.view(dtype).to(device)


class FailureMarks:
    """Looks for marks in what the ranks sent, without making the host wait for a device."""

    def __init__(self) -> None:
        self._heads: Tensor | None = None
        self._ranks: list[int] = []
        self._arrival: torch.Event | None = None

    def note(self, parts: Sequence[Tensor]) -> None:
        """Take note of what each rank sent: its beginning, on its way to the host."""
        self._ranks = [
            rank
            for rank, part in enumerate(parts)
            if part.numel() * part.element_size() >= MARK_BYTES
        ]
        self.clear()
        if not self._ranks:
            return
        width = MARK_BYTES // parts[0].element_size()
        heads = torch.stack([parts[rank][:width] for rank in self._ranks])
        if heads.device.type == "cpu":
            self._heads = heads
            return
        self._heads = torch.empty(heads.shape, dtype=heads.dtype, pin_memory=True)
        self._heads.copy_(heads, non_blocking=True)
        self._arrival = torch.Event(heads.device)
        self._arrival.record()

    def failed_at_once(self) -> list[int]:
        """Group ranks that sent a mark, if that is known without waiting; else none."""
        return [] if self._arrival is not None else self.failed()

    def failed(self) -> list[int]:
        """Group ranks that sent a mark in the step that was noted last."""
        if self._heads is None:
            return []
        if self._arrival is not None:
            self._arrival.synchronize()
        rows = self._heads.view(torch.uint8).tolist()
        self.clear()
        found = zip(self._ranks, rows, strict=True)
        return [rank for rank, row in found if bytes(row) == _MARK]

    def clear(self) -> None:
        """Forget what was noted."""
        self._heads, self._arrival = None, None
