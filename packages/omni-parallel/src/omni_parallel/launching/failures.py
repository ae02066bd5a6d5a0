"""What to say when ranks fail: the first one's own words."""

from __future__ import annotations

import signal
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from omni_group_coordinator import ParallelError

_HEAD, _TAIL = 10, 19
"""Lines that are shown of what a rank said: how it began, and what it came to."""


class RankFailedError(ParallelError):
    """A rank failed, and every rank has ended.

    Args:
        rank: The first that failed.
        message: What is said of it.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def rank_failure(error: ChildFailedError) -> RankFailedError:
    """What to raise for an error of the agent, when every rank has ended."""
    return RankFailedError(error.get_first_failure()[0], first_failure(error))


def first_failure(error: ChildFailedError, said: str = "") -> str:
    """Which rank was the first to fail, of what, and its traceback.

    Args:
        error: Of the agent, when every rank has ended.
        said: What the rank printed, where it left no record of its error.
    """
    rank, failure = error.get_first_failure()
    message = failure.message
    if isinstance(message, dict):
        message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
    text = said.strip() or str(message).strip()
    first = f"rank {rank} was the first to fail{how(failure)} (all ranks have ended):"
    return f"{first}\n{shortened(text)}"


def shortened(text: str) -> str:
    """A long text without its middle, in whose place is how many lines were left out."""
    lines = text.splitlines()
    left_out = len(lines) - _HEAD - _TAIL
    if left_out > 1:
        lines[_HEAD:-_TAIL] = [f"  ... {left_out} lines left out ..."]
    return "\n".join(lines)


def how(failure: ProcessFailure) -> str:
    """How a process ended: by which signal, or with which status."""
    if failure.exitcode >= 0:
        return f" with status {failure.exitcode}"
    number = -failure.exitcode
    try:
        name = f" ({signal.Signals(number).name})"
    except ValueError:
        name = ""
    return f" by signal {number}{name}"


def last_words(folder: Path) -> str:
    """What a rank printed as errors, or else at all, without its middle if it is long.

    Args:
        folder: Of the rank, in that of the agent's logs.
    """
    for name in ("stderr.log", "stdout.log"):
        file = folder / name
        if file.is_file() and (text := file.read_text(errors="replace").strip()):
            return shortened(text)
    return ""
