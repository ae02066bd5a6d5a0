"""The one hierarchy of errors that all packages of omni-parallel raise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial


class ParallelError(RuntimeError):
    """Base of every error that omni-parallel raises on purpose."""


class ParallelConfigError(ParallelError, ValueError):
    """Something asked for cannot work, and that is known before any communication.

    The message says what was asked, why it cannot work, and which legal values are nearest.
    """


class CommunicationError(ParallelError):
    """A collective or a message failed: a peer died, the link broke, or the timeout passed.

    The group is unusable afterwards: destroy it and make a new one.

    Attributes:
        group: Name of the group.
        ranks: Global ranks of the group.
        operation: What was running, for example ``"all_reduce"``.
    """

    def __init__(self, message: str, *, group: str, ranks: Sequence[int], operation: str) -> None:
        super().__init__(message)
        self.group = group
        self.ranks = tuple(ranks)
        self.operation = operation

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle with the keyword arguments, so that a launcher can hand the error on."""
        make = partial(type(self), group=self.group, ranks=self.ranks, operation=self.operation)
        return make, self.args, self.__dict__


class RankMismatchError(ParallelError):
    """Ranks of one group called different operations, or with different shapes or dtypes.

    Raised on every rank of the group, by the debug mode and by the checks of tensor dicts.
    """


# gloo opens with a path on the machine that built torch and closes with good wishes.
_CHATTER = re.compile(
    r"^\[[^\]\s]*/[^\]\s]*:\d+\]\s*|\s*Check the logs of the remote worker.*$|\s*GLHF!.*$"
)


def reason_of(error: BaseException) -> str:
    """The first line of a backend's error without what helps nobody here."""
    lines = str(error).strip().splitlines()
    return (_CHATTER.sub("", lines[0]) if lines else "") or repr(error)
