"""What became of the ranks of one run, and the text of a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "raised", "died", "hung"]

LOG_LINES = 50


class RemoteError(Exception):
    """Stands for an exception of a rank that could not be pickled.

    Attributes:
        type_name: Qualified name of the original exception's class.
        text: `str()` of the original exception.
    """

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(type_name, text)
        self.type_name = type_name
        self.text = text

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one rank in one run."""

    rank: int
    """Global rank, 0 to world size - 1."""
    status: Status
    """ok: returned; raised: ended by an exception; died: the process ended by itself;
    hung: still at work at the timeout, and killed."""
    value: Any = None
    """What the function returned; None unless ok."""
    exception: BaseException | None = None
    """What the function raised; a `RemoteError` if that cannot be pickled; None unless raised."""
    traceback: str = ""
    """The full traceback as text; empty unless raised."""
    exit_code: int | None = None
    """Exit code of the process, negative for a signal; None where it lives on (ok, raised)."""
    stack: str = ""
    """Python stacks of all threads at the timeout; empty unless hung."""
    stdout: str = ""
    """What the rank wrote to standard output in this run."""
    stderr: str = ""
    """What the rank wrote to standard error in this run."""
    ended_at: float = 0.0
    """When the rank returned, raised, died or was killed: seconds of `time.monotonic()`."""


class RankFailure(Exception):  # noqa: N818  # named for what the test author sees
    """At least one rank did not return.

    Attributes:
        outcomes: The outcomes of all ranks of the run, by rank.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        super().__init__(list(outcomes))
        self.outcomes = list(outcomes)

    def __str__(self) -> str:
        failed = [outcome for outcome in self.outcomes if outcome.status != "ok"]
        failed.sort(key=lambda outcome: outcome.ended_at)
        others = [str(outcome.rank) for outcome in self.outcomes if outcome.status == "ok"]
        head = f"{len(failed)} of {len(self.outcomes)} ranks failed, the first to fail first"
        if others:
            head += f" (ok: rank {', '.join(others)})"
        return "\n\n".join([head, *("\n".join(_describe(outcome)) for outcome in failed)])


def _describe(outcome: Outcome) -> Iterator[str]:
    yield f"=== rank {outcome.rank} {_verdict(outcome)}"
    if outcome.traceback:
        yield outcome.traceback.rstrip()
    if outcome.status == "hung":
        yield outcome.stack.rstrip() or "(no stack: the process did not answer)"
    for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
        lines = text.splitlines()
        if lines:
            cut = f", last {LOG_LINES} of {len(lines)} lines" if len(lines) > LOG_LINES else ""
            yield f"--- {name} of rank {outcome.rank}{cut}"
            yield from lines[-LOG_LINES:]


def _verdict(outcome: Outcome) -> str:
    if outcome.status == "raised":
        return f"raised {type(outcome.exception).__name__}"
    if outcome.status == "hung":
        return "hung: still at work at the timeout, and killed; its stacks then:"
    code = outcome.exit_code
    if code is not None and code < 0:
        return f"died of {_signal_name(-code)}"
    return f"died with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
