"""The cases of the benchmark of sequence parallelism, and what each rank does in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.arithmetic import attention_units
from bench.contestants import Contestant
from bench.harness import Progress, process_group
from bench.models import attention_bytes, build, inputs, shorten, twin
from bench.race import attempt, from_all_ranks
from bench.ready import Ready, Run, make_ready, race_all
from bench.results import CaseResult, Measured, Traffic
from bench.shims import without_accelerator
from omni_group_coordinator import Traffic as Recording
from omni_group_coordinator import record_traffic

WARM_UP: Final = 2
"""Forwards of each contestant before the first round."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    family: str
    tokens: int
    layers: int
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        extra = "-bf16" if self.dtype == torch.bfloat16 else ""
        return f"{self.family}-{self.tokens}{extra}{'-compiled' if self.compiled else ''}"

    @property
    def title(self) -> str:
        """What tables call it."""
        kind = str(self.dtype).removeprefix("torch.")
        compiled = ", compiled" if self.compiled else ""
        return f"{self.family} {self.tokens} tokens, {self.layers} layers, {kind}{compiled}"


CASES: Final = {
    case.name: case
    for case in (
        Case("flux", 320, 9),
        Case("flux", 1280, 9),
        Case("qwen", 1280, 6),
        Case("wan", 1280, 8),
        Case("flux", 4608, 3),
        Case("wan", 4500, 3),
        Case("flux", 1280, 9, torch.bfloat16),
        Case("flux", 1280, 9, compiled=True),
    )
}
LONG_CASES: Final = {
    case.name: case for case in (Case(family, 8192, 3) for family in ("flux", "qwen", "wan"))
}


def case_of(family: str, tokens: int) -> Case:
    """The case of a model with any number of tokens: fewer layers where there are many."""
    usual = {"flux": 9, "qwen": 6, "wan": 8}[family]
    return Case(family, tokens, usual if tokens <= 2048 else 3)


@torch.no_grad()
def race_case(
    progress: Progress, case: Case, contestants: Sequence[Contestant], rounds: int
) -> CaseResult:
    """Run a case; every rank calls it."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with process_group(), without_accelerator():
        model = build(case.family, case.layers, case.dtype)
        arguments = inputs(case.family, case.tokens, case.dtype)
        single = _caller(_compiled(twin(model)) if case.compiled else model, arguments)
        for _ in range(WARM_UP):
            reference = single()
        progress.step(2)
        ready = []
        for contestant in contestants:
            ready.append(_prepare(case, model, arguments, contestant, reference))
            progress.step()
        raced = race_all(single, ready, rounds, progress.step)
    return CaseResult(
        case=case.title,
        ranks=contestants[0].ulysses * contestants[0].ring,
        rival="diffusers",
        single=raced.single,
        together=raced.together,
        measured=raced.measured,
        core_share=raced.core_share,
    )


def _prepare(
    case: Case,
    model: nn.Module,
    arguments: dict[str, Any],
    contestant: Contestant,
    reference: Tensor,
) -> Ready:
    split = twin(model)

    def traffic() -> Traffic:  # of eager calls: what is compiled is not counted
        return _traffic(case, model, split, arguments, contestant)

    def caller() -> tuple[Run, str | None]:
        if case.compiled:
            return _compile(split, arguments)
        return _caller(split, arguments), None

    return make_ready(
        Measured(contestant.name, contestant.side),
        lambda: contestant.apply(split),
        caller,
        reference,
        warm_up=WARM_UP,
        traffic=traffic if contestant.side == "omni-sp" else None,
    )


def _caller(model: nn.Module, arguments: dict[str, Any]) -> Run:
    def call() -> Tensor:
        output: Tensor = model(**arguments)[0]
        return output

    return call


def _compiled(model: nn.Module, *, fullgraph: bool = True) -> nn.Module:
    # In place of torch.compile(model), which is typed as a function.
    model.compile(fullgraph=fullgraph, dynamic=False)
    return model


def _compile(model: nn.Module, arguments: dict[str, Any]) -> tuple[Run, str | None]:
    """A compiled call; with graph breaks, which are then noted, if there is no other way."""
    run = _caller(_compiled(model), arguments)
    _, problem = attempt(run)
    if problem is None:
        return run, None
    broken = _caller(_compiled(model, fullgraph=False), arguments)
    return broken, f"graph breaks; fullgraph=True says {problem}"


def _traffic(
    case: Case,
    model: nn.Module,
    split: nn.Module,
    arguments: dict[str, Any],
    contestant: Contestant,
) -> Traffic:
    """What the last layer sends: the whole model's traffic less that of one without it."""
    shorter = shorten(case.family, model)
    undo = contestant.apply(shorter)
    try:
        without = _second_call(shorter, arguments)
    finally:
        undo()
    whole = _second_call(split, arguments)
    units = attention_units(contestant.ulysses, contestant.ring)
    return Traffic(
        bytes_sent=max(from_all_ranks(whole.total_bytes - without.total_bytes)),
        formula=units * attention_bytes(case.tokens, case.dtype),
        calls=dict(Counter(whole.calls) - Counter(without.calls)),
    )


def _second_call(model: nn.Module, arguments: dict[str, Any]) -> Recording:
    """What a call sends, of a model that is called a second time: in the first ranks agree."""
    model(**arguments)
    with record_traffic() as traffic:
        model(**arguments)
    return traffic
