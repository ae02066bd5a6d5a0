"""One run: follow the ranks from the task to the state in which they can be used again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum, auto
from multiprocessing.connection import wait
from typing import Any

from rank_harness.outcome import Outcome, RemoteError, Status
from rank_harness.process import STACK_S, RankProcess
from rank_harness.wire import READY, RELEASE, Answer, Task, unpack

CLEAN_S = 10.0
"""Seconds that a rank has to clean up after its answer before it is killed."""


class _Stage(Enum):
    WORKING = auto()
    RETURNED = auto()
    CLEANING = auto()
    ENDED = auto()


class _Member:
    """One rank in one run."""

    def __init__(self, process: RankProcess, deadline: float) -> None:
        self.process = process
        self.stage = _Stage.WORKING
        self.deadline = deadline
        self.status: Status = "ok"
        self.ended_at = 0.0
        self.answer: Answer | None = None
        self.stack = ""
        self.exit_code: int | None = None

    def hear(self) -> None:
        """Act on the next message, or on the end of the process."""
        try:
            message = self.process.connection.recv() if self.process.connection.poll() else None
        except (EOFError, OSError):
            message = None
        if isinstance(message, Answer):
            self._take(message)
        elif message == READY:
            self.stage = _Stage.ENDED
        else:
            self._died()

    def release(self) -> None:
        """Let a rank that returned clean up."""
        self.process.send(RELEASE)
        self._clean_up()

    def end_hung(self, deadline: float) -> None:
        """Read the stacks that were asked for, then kill the rank."""
        self.stack = self.process.read_stack(deadline)
        self.status, self.ended_at = "hung", time.monotonic()
        self.end()

    def end(self) -> None:
        """Kill the rank."""
        self.process.kill()
        if self.answer is None:
            self.exit_code = self.process.exit_code()
        self.stage = _Stage.ENDED

    def outcome(self) -> Outcome:
        """Sum up."""
        return Outcome(
            rank=self.process.rank,
            status=self.status,
            exit_code=self.exit_code,
            stack=self.stack,
            stdout=self.process.written("stdout"),
            stderr=self.process.written("stderr"),
            ended_at=self.ended_at,
            **self._unpacked(),
        )

    def _take(self, answer: Answer) -> None:
        self.answer, self.status, self.ended_at = answer, answer.status, answer.ended_at
        if answer.status == "ok":
            self.stage = _Stage.RETURNED
        else:
            self._clean_up()

    def _clean_up(self) -> None:
        self.stage, self.deadline = _Stage.CLEANING, time.monotonic() + CLEAN_S

    def _died(self) -> None:
        if self.answer is None:
            self.status, self.ended_at = "died", time.monotonic()
            self.exit_code = self.process.exit_code()
        self.stage = _Stage.ENDED

    def _unpacked(self) -> dict[str, Any]:
        if self.answer is None:
            return {}
        try:
            body = unpack(self.answer.body)
        except Exception as error:
            body = RemoteError(type(error).__name__, f"the result cannot be unpickled: {error}")
        if self.answer.status == "ok":
            return {"value": body}
        return {"exception": body, "traceback": self.answer.traceback}


def perform(
    processes: Sequence[RankProcess], tasks: Sequence[Task], timeout: float
) -> list[Outcome]:
    """Give each rank its task and wait until each is clean again or has ended.

    Args:
        processes: The ranks, all idle.
        tasks: One for each rank.
        timeout: Seconds from now until a rank that has not answered is hung.

    Returns:
        The outcomes in the order of the processes.
    """
    deadline = time.monotonic() + timeout
    members = [_Member(process, deadline) for process in processes]
    try:
        for process, task in zip(processes, tasks, strict=True):
            process.mark()
            process.send(task)
        while busy := [m for m in members if m.stage is not _Stage.ENDED]:
            _hear_next(busy)
            _end_late(busy)
            _release_returned(members)
    finally:  # on Ctrl-C and the like too
        for member in members:
            if member.stage is not _Stage.ENDED:
                member.end()
    return [member.outcome() for member in members]


def _hear_next(busy: Sequence[_Member]) -> None:
    handles: dict[Any, _Member] = {}
    for member in busy:
        handles[member.process.connection] = member
        handles[member.process.sentinel] = member
    limit = min(member.deadline for member in busy) - time.monotonic()
    for member in dict.fromkeys(handles[handle] for handle in wait(handles, max(0.0, limit))):
        member.hear()


def _end_late(busy: Sequence[_Member]) -> None:
    now = time.monotonic()
    hung = [m for m in busy if m.stage is _Stage.WORKING and now >= m.deadline]
    for member in hung:
        member.process.ask_for_stack()
    for member in hung:
        member.end_hung(now + STACK_S)
    for member in busy:
        if member.stage is _Stage.CLEANING and now >= member.deadline:
            member.end()


def _release_returned(members: Sequence[_Member]) -> None:
    """Release the ranks that returned: once all have, or as soon as one never will.

    Until then they stay, since a group that closes is an error to ranks still at work.
    """
    working = any(member.stage is _Stage.WORKING for member in members)
    failed = any(member.status != "ok" for member in members)
    if failed or not working:
        for member in members:
            if member.stage is _Stage.RETURNED:
                member.release()
