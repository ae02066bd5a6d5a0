"""Messages under way."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed import Work

if TYPE_CHECKING:
    from omni_group_coordinator.checked_group import CheckedGroup


class PendingWork:
    """A message under way. Keeps its tensors alive until `wait` returns.

    Dropping it without `wait` is a mistake, told by a `ResourceWarning`: the data may never
    arrive.
    """

    def __init__(
        self,
        group: CheckedGroup,
        operation: str,
        work: Work | None,
        keep: Sequence[Tensor],
    ) -> None:
        self._group = group
        self._operation = operation
        self._work = work
        self._keep = tuple(keep)
        self._done = work is None

    def wait(self) -> None:
        """Return once the data may be used (on a device: by work queued after this call).

        Raises:
            CommunicationError: The peer died or the timeout of the group passed.
        """
        if self._done:
            return
        if self._work is not None:
            self._group.run(self._operation, self._work.wait)
        self._done, self._work, self._keep = True, None, ()

    def is_completed(self) -> bool:
        """Whether `wait` has returned (gloo cannot tell earlier)."""
        return self._done

    def __del__(self) -> None:
        # Of a group that has failed nobody needs to hear that its other messages are lost.
        if self._done or self._group.failed:
            return
        message = f"{self._operation} in group {self._group.name!r} was dropped without wait()"
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)


def wait_all(works: Sequence[PendingWork]) -> None:
    """Wait for every work, in order."""
    for work in works:
        work.wait()
