"""The cases of the benchmark of stages, and what each rank does in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from bench.harness import Progress, process_group
from bench.pipelines import GuidedPipeline
from bench.pp_contestants import ALONE, EXACT_STEPS, OWN, STAGES, Entrant, StageContestant
from bench.pp_results import StagedMeasured, StagedResult
from bench.pp_work import GUIDED, UNGUIDED, Work, arguments, build_work
from bench.race import from_all_ranks
from bench.ready import Ready, make_ready, race_all
from bench.results import Measured, Traffic
from omni_group_coordinator import record_traffic

WARM_UP: Final = 1
"""Calls by each contestant before the first round; each has several steps."""
_MEASURED: Final = 3  # times that blocks are measured, of which the fastest counts


@dataclass(frozen=True)
class StagedCase:
    """One row of the benchmark.

    Attributes:
        family: Of `bench.models.FAMILIES`.
        tokens: In attention.
        layers: Blocks; as many in each chunk if they are a multiple of all chunks.
        steps: Denoising steps of an image.
    """

    family: str
    tokens: int
    layers: int = 16
    steps: int = 6

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"{self.family}-{self.tokens}"

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.family} {self.tokens} tokens, {self.layers} blocks, {self.steps} steps"


CASES: Final = {
    case.name: case
    for case in (StagedCase("flux", 320), StagedCase("wan", 320), StagedCase("qwen", 320))
}
LARGE_CASES: Final = {case.name: case for case in (StagedCase("flux", 1280, 8),)}
"""Of as many tokens as patches are for; run if they are asked for."""
QUICK_CASES: Final = {case.name: case for case in (StagedCase("wan", 120, 8, 2),)}
OTHER_CASES: Final = {**LARGE_CASES, **QUICK_CASES}


@torch.no_grad()
def race_case(
    progress: Progress, case: StagedCase, contestants: Sequence[StageContestant], rounds: int
) -> StagedResult:
    """Run a case; every rank calls it."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with process_group():
        stock = build_work(case.family, case.tokens, case.layers)
        costs = block_costs(stock)
        single = Entrant(StageContestant(ALONE, "guided"), stock, costs)
        references: dict[tuple[Work, int], Tensor] = {(GUIDED, 1): single.run(case.steps)}
        progress.step(2)
        ready = []
        for contestant in contestants:
            key = contestant.work, contestant.requests
            if key not in references:
                alone = replace(contestant, side=ALONE)
                references[key] = Entrant(alone, stock, costs).run(case.steps)
            entrant = Entrant(contestant, stock.twin(), costs)
            ready.append(_ready(case, entrant, references[key]))
            progress.step()
        raced = race_all(lambda: single.run(case.steps), ready, rounds, progress.step)
    images = {contestant.name: contestant.images for contestant in contestants}
    return StagedResult(
        case=case.title,
        ranks=STAGES,
        rival="omni-sp",
        single=raced.single,
        together=raced.together,
        measured=tuple(_per_image(each, images[each.name]) for each in raced.measured),
        core_share=raced.core_share,
        timed="image",
        counted="step",
    )


def block_costs(guided: GuidedPipeline) -> tuple[float, ...]:
    """Seconds of each block of the transformer, alike on every rank: as rank 0 measured them."""
    from omni_pp.partition import measure_block_costs

    call = arguments(UNGUIDED.of(guided), 1)
    guided.pipeline(**call)
    model = guided.pipeline.transformer
    found = [measure_block_costs(model, lambda: guided.pipeline(**call)) for _ in range(_MEASURED)]
    return from_all_ranks(tuple(map(min, *found)))[0]


def _per_image(measured: Measured, images: int) -> Measured:
    return replace(measured, seconds=tuple(second / images for second in measured.seconds))


def _ready(case: StagedCase, entrant: Entrant, reference: Tensor) -> Ready:
    contestant = entrant.contestant
    facts: dict[str, Any] = {}

    def traffic() -> Traffic:
        return _count(case, entrant, facts)

    measured = StagedMeasured(
        contestant.name,
        contestant.side,
        mode=contestant.mode,
        work=contestant.work.name,
        ideal=contestant.ideal_of(case.steps),
        patches=contestant.patches,
        exact_share=EXACT_STEPS / case.steps,
    )
    ready = make_ready(
        measured,
        entrant.apply,
        lambda: (lambda: entrant.run(case.steps), None),
        reference,
        warm_up=WARM_UP,
        traffic=None if contestant.alone else traffic,
        alone=contestant.alone,
    )
    if ready.run is None:
        return ready
    held, promised = zip(*from_all_ranks(entrant.weights()), strict=True)
    facts["held"] = held
    facts["promised"] = promised if contestant.side == OWN else held
    return replace(ready, measured=replace(ready.measured, **facts))


def _count(case: StagedCase, entrant: Entrant, facts: dict[str, Any]) -> Traffic:
    """What each rank sends in a step: in a call of two steps less in a call of one."""
    entrant.run(2)  # in its first calls a contestant may have more to say

    def sent(steps: int) -> tuple[int, dict[str, int]]:
        with record_traffic() as recording:
            entrant.run(steps)
        return recording.total_bytes, dict(recording.calls)

    (first, calls), (both, more) = sent(1), sent(2)
    facts["sent"] = tuple(from_all_ranks(both - first))
    facts["expected"] = entrant.contestant.bytes_of_step(entrant.guided, case.layers)
    most = max(range(STAGES), key=lambda rank: facts["sent"][rank])
    counted = {name: count - calls.get(name, 0) for name, count in more.items()}
    return Traffic(
        bytes_sent=int(facts["sent"][most]),
        formula=facts["expected"][most],
        calls={name: count for name, count in counted.items() if count},
        once_bytes=first - (both - first),
    )
