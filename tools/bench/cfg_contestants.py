"""The contestants of guidance: one batch of both branches, a rank for each, or split sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from bench.arithmetic import attention_units
from bench.contestants import Contestant, Named, applied
from bench.pipelines import GuidedPipeline
from omni_parallel_state import ParallelLayout

BRANCHES: Final = 2
"""With the prompt, and without."""


@dataclass(frozen=True)
class GuidanceContestant(Named):
    """One way to compute both branches of each step.

    Attributes:
        side: Whose it is.
        mode: What ``--modes`` calls it.
        split: How the sequence is split over the ranks, if it is.
    """

    side: str
    mode: str
    split: Contestant | None = None

    @property
    def alone(self) -> bool:
        """Whether one process does all."""
        return self.side == "single"

    @property
    def counts_traffic(self) -> bool:
        """Whether it sends over this repository's groups, which count."""
        return self.side.startswith("omni-")

    def apply(self, guided: GuidedPipeline) -> Callable[[], None]:
        """Make a pipeline parallel in place, on every rank.

        Returns:
            Takes that back, as far as it can.
        """
        if self.split is not None:
            return self.split.apply(guided.pipeline.transformer)
        return (lambda: None) if self.alone else _divide_branches(guided)

    def run(self, guided: GuidedPipeline, steps: int) -> Tensor:
        """Make a picture with the pipeline, once `apply` was called."""
        return guided.batched(steps) if self.alone else guided.sequential(steps)

    def formula(self, guided: GuidedPipeline) -> float:
        """Bytes that arithmetic says a rank sends in a step.

        A branch on each rank: its prediction, to every other one. Split sequences: what each
        layer's attention sends, and the rank's part of the prediction, for every branch.
        """
        if self.split is None:
            return guided.prediction_bytes * (BRANCHES - 1)
        units = attention_units(self.split.ulysses, self.split.ring)
        part = guided.prediction_bytes / BRANCHES
        return BRANCHES * (units * guided.attention_bytes + part * (BRANCHES - 1))


def _divide_branches(guided: GuidedPipeline) -> Callable[[], None]:
    from omni_cfgp import apply_cfg_parallel

    pipeline, layout = guided.pipeline, ParallelLayout(cfg=BRANCHES)
    return applied(layout, "cpu", lambda state: apply_cfg_parallel(pipeline, state=state))


def guidance_contestants() -> list[GuidanceContestant]:
    """Every contestant, on a rank for each branch."""
    splits = (
        Contestant("omni-sp", "ulysses", ulysses=BRANCHES),
        Contestant("diffusers", "ulysses", ulysses=BRANCHES),
        Contestant("diffusers", "ring", ring=BRANCHES),
    )
    return [
        GuidanceContestant("single", "batched"),
        GuidanceContestant("omni-cfgp", "branches"),
        *(GuidanceContestant(split.side, split.mode, split) for split in splits),
    ]
