"""The cases of the benchmark of guidance, and what each rank does in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bench.cfg_contestants import BRANCHES, GuidanceContestant
from bench.harness import Progress, process_group
from bench.pipelines import GuidedPipeline, build_pipeline
from bench.race import from_all_ranks
from bench.ready import Ready, make_ready, race_all
from bench.results import CaseResult, Measured, Traffic
from bench.shims import without_accelerator
from omni_group_coordinator import Traffic as Recording
from omni_group_coordinator import record_traffic

WARM_UP: Final = 1
"""Calls of the pipeline by each contestant before the first round; each has several steps."""
_DEMO_TEXT: Final = 24
_DEMO_TOKEN: Final = 16  # pixels of a side


@dataclass(frozen=True)
class GuidedCase:
    """One row of the benchmark.

    Attributes:
        family: Of `bench.pipelines.PIPELINES`.
        size: Pixels of a side for the demonstration model, else tokens in attention.
        layers: Attention layers, where the weights are random.
        steps: Denoising steps of a picture.
    """

    family: str
    size: int
    layers: int = 0
    steps: int = 4

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"{self.family}-{self.size}"

    @property
    def title(self) -> str:
        """What tables call it."""
        if self.family == "demo":
            what = f"demo {self.size} px, {(self.size // _DEMO_TOKEN) ** 2 + _DEMO_TEXT} tokens"
        else:
            what = f"{self.family} {self.size} tokens, {self.layers} layers"
        return f"{what}, {self.steps} steps"


CASES: Final = {
    case.name: case
    for case in (
        GuidedCase("demo", 128),
        GuidedCase("demo", 256),
        GuidedCase("demo", 512),
        GuidedCase("qwen", 1280, 3),
        GuidedCase("wan", 1280, 4),
    )
}


@torch.no_grad()
def race_case(
    progress: Progress, case: GuidedCase, contestants: Sequence[GuidanceContestant], rounds: int
) -> CaseResult:
    """Run a case; every rank calls it."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with process_group(), without_accelerator():
        stock = build_pipeline(case.family, case.size, case.layers)

        def single() -> Tensor:
            return stock.sequential(case.steps)

        reference = single()
        progress.step(2)
        ready = []
        for contestant in contestants:
            ready.append(_prepare(case, stock, contestant, reference))
            progress.step()
        raced = race_all(single, ready, rounds, progress.step, parts=case.steps)
    return CaseResult(
        case=case.title,
        ranks=BRANCHES,
        rival="diffusers",
        single=raced.single,
        together=raced.together,
        measured=raced.measured,
        core_share=raced.core_share,
        baseline="single sequential",
        timed="step",
        counted="step",
    )


def _prepare(
    case: GuidedCase, stock: GuidedPipeline, contestant: GuidanceContestant, reference: Tensor
) -> Ready:
    own = stock.twin()

    def traffic() -> Traffic:
        return _traffic(own, contestant)

    return make_ready(
        Measured(contestant.name, contestant.side),
        lambda: contestant.apply(own),
        lambda: (lambda: contestant.run(own, case.steps), None),
        reference,
        warm_up=WARM_UP,
        traffic=traffic if contestant.counts_traffic else None,
        alone=contestant.alone,
    )


def _traffic(own: GuidedPipeline, contestant: GuidanceContestant) -> Traffic:
    """What a step sends: a call of two less a call of one; the rest comes once in each call."""
    contestant.run(own, 1)  # in its first call a contestant may have more to say

    def recorded(steps: int) -> Recording:
        with record_traffic() as recording:
            contestant.run(own, steps)
        return recording

    one, two = recorded(1), recorded(2)
    step = Counter(two.calls) - Counter(one.calls)
    sent = two.total_bytes - one.total_bytes
    return Traffic(
        bytes_sent=max(from_all_ranks(sent)),
        formula=contestant.formula(own),
        calls=dict(step),
        once=dict(Counter(one.calls) - step),
        once_bytes=max(from_all_ranks(one.total_bytes - sent)),
    )
