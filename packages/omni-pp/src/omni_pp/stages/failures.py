"""One stage's error on every rank, without a collective in any step that goes well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_pp.stages.staged_denoiser import LostFlowError, Piece


class Failures:
    """Looks at the status that came with each result, which is the same on every rank.

    On a device it is looked at one round later, when it is on the host without anyone waiting.

    Args:
        group: The stages.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._errors: list[Exception] = []
        self._heads: Tensor | None = None
        self._copied: torch.Event | None = None

    def note(self, pieces: Sequence[Piece]) -> None:
        """Take note of the pieces of a round that has ended.

        Raises:
            Exception: What this rank's stage failed with, in this round or the one before.
            ParallelError: Another stage failed; on every rank at the same place.
        """
        failed = self._earlier()
        own = (piece.error for piece in pieces if piece.error is not None)
        self._errors += [error for error in own if not isinstance(error, LostFlowError)]
        statuses = [piece.status for piece in pieces if piece.status is not None]
        failed |= len(statuses) < len(pieces)
        if self._group.device.type == "cpu":
            failed |= any(map(bool, statuses))
        elif statuses:
            self._heads = torch.empty(len(statuses), dtype=torch.uint8, pin_memory=True)
            self._heads.copy_(torch.cat(statuses), non_blocking=True)
            self._copied = torch.Event(statuses[0].device)
            self._copied.record()
        if failed:
            self._raise()

    def settle(self) -> None:
        """The end of a request: errors are told that would have been in the next round.

        Raises:
            Exception: As `note`.
        """
        if self._earlier():
            self._raise()

    def clear(self) -> None:
        """Forget what was noted."""
        self._errors.clear()
        self._heads, self._copied = None, None

    def _earlier(self) -> bool:
        heads, copied = self._heads, self._copied
        if heads is None or copied is None:
            return False
        copied.synchronize()
        self._heads, self._copied = None, None
        return bool(heads.any())

    def _raise(self) -> None:
        error = self._errors[0] if self._errors else None
        text = None if error is None else f"{type(error).__name__}: {error}"
        self.clear()
        said = self._group.all_gather_object(text)
        if error is not None:
            raise error
        found = [f"stage {stage} failed: {text}" for stage, text in enumerate(said) if text]
        raise ParallelError("; ".join(found) or "a stage failed, and none says how")
