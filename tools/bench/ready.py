"""Contestants made ready for a race, on every rank alike; those that cannot leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from bench.race import Entry, attempt, race, relative_error
from bench.results import SINGLE, TOGETHER, Measured, Traffic

Run = Callable[[], Tensor]
Undo = Callable[[], None]


@dataclass
class Ready:
    """A contestant that has run once, or has said why it cannot.

    Attributes:
        measured: What is known of it so far.
        run: What is timed; ``None`` if it cannot.
        alone: Rank 0 works while the others wait.
        undo: Takes back what it made.
    """

    measured: Measured
    run: Run | None = None
    alone: bool = False
    undo: list[Undo] = field(default_factory=list)


def make_ready(
    measured: Measured,
    apply: Callable[[], Undo],
    caller: Callable[[], tuple[Run, str | None]],
    reference: Tensor,
    *,
    warm_up: int,
    traffic: Callable[[], Traffic] | None = None,
    alone: bool = False,
) -> Ready:
    """Apply a contestant, warm it up, and take its error and traffic.

    Args:
        measured: Its name and side.
        apply: Makes what it is about; returns what takes that back.
        caller: Then makes what is timed, with a remark on it.
        reference: The result of one process.
        warm_up: Calls before the first round.
        traffic: Counts what it sends, where it can be counted.
        alone: Rank 0 works while the others wait.
    """
    ready = Ready(measured, alone=alone)
    undo, problem = attempt(apply)
    if undo is None:
        return _unable(ready, problem)
    ready.undo.append(undo)
    sent = None
    if traffic is not None:
        sent, problem = attempt(traffic)
        if sent is None:
            return _unable(ready, problem)
    ready.run, note = caller()
    output, problem = attempt(_warm(ready.run, warm_up))
    if output is None:
        return _unable(ready, problem)
    error = relative_error(output, reference)
    ready.measured = replace(measured, error=error, traffic=sent, problem=note)
    return ready


def _warm(run: Run, times: int) -> Run:
    def warm() -> Tensor:
        for _ in range(times):
            output = run()
        return output

    return warm


def _unable(ready: Ready, problem: str | None) -> Ready:
    _undo(ready)
    return Ready(replace(ready.measured, problem=problem))


def _undo(ready: Ready) -> None:
    while ready.undo:
        ready.undo.pop()()


@dataclass(frozen=True)
class Raced:
    """Who ran in which time."""

    single: tuple[float, ...]
    together: tuple[float, ...]
    measured: tuple[Measured, ...]
    core_share: float


def race_all(
    single: Callable[[], Any],
    team: Sequence[Ready],
    rounds: int,
    on_step: Callable[[], None],
    parts: int = 1,
) -> Raced:
    """Race one process, the same on all ranks and the contestants; then take these back.

    Args:
        single: The work of one process.
        team: The contestants.
        rounds: How often.
        on_step: Called after each turn.
        parts: How many equal parts the work has; times are those of one.
    """
    entries = [Entry(SINGLE, single, alone=True), Entry(TOGETHER, single)]
    entries += [Entry(r.measured.name, r.run, r.alone) for r in team if r.run is not None]
    times = race(entries, rounds, on_step)
    for each in team:
        _undo(each)
    seconds = {name: tuple(s / parts for s in found) for name, found in times.seconds.items()}
    return Raced(
        single=seconds[SINGLE],
        together=seconds[TOGETHER],
        measured=tuple(
            replace(each.measured, seconds=seconds.get(each.measured.name, ())) for each in team
        ),
        core_share=times.core_share[TOGETHER],
    )


def steps_of(contestants: int, rounds: int) -> int:
    """Steps of progress: two for one process, one for each contestant, and then every turn."""
    return (2 + contestants) * (rounds + 1)
