"""The contestants of stages: what fills the pipeline of each, and what it can gain by that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from bench.cfg_contestants import GuidanceContestant
from bench.contestants import Contestant, Named, applied
from bench.models import attention_bytes
from bench.pipelines import GuidedPipeline
from bench.pp_arithmetic import bytes_of_step, ideal, ideal_of_patches, ideal_of_requests
from bench.pp_work import BATCH, GUIDED, UNGUIDED, Work, arguments
from omni_parallel_state import ParallelLayout

STAGES: Final = 2
OWN: Final = "omni-pp"
ALONE: Final = "single"
PATCHES: Final = (2, 3, 4, 8)
EXACT_STEPS: Final = 1


@dataclass(frozen=True)
class StageContestant(Named):
    """One way to compute some work.

    Attributes:
        side: Whose it is.
        mode: What ``--modes`` calls it.
        work: What each call of the pipeline makes.
        virtual: Chunks on each stage.
        micro_batches: Parts of a batch.
        requests: Calls of the pipeline that run together.
        patches: Into which PipeFusion cuts an image; 0: it is not used.
    """

    side: str
    mode: str
    work: Work = GUIDED
    virtual: int = 1
    micro_batches: int = 1
    requests: int = 1
    patches: int = 0

    @property
    def alone(self) -> bool:
        """Whether one process does all."""
        return self.side == ALONE

    @property
    def images(self) -> int:
        """How many it makes at once."""
        return self.requests * self.work.images

    @property
    def in_flight(self) -> int:
        """Micro-batches of one request in a step."""
        return self.work.branches * self.micro_batches

    def ideal_of(self, steps: int) -> float:
        """The speed-up of an image of some steps, of which PipeFusion's first one is exact."""
        if not self.patches:
            return self.ideal
        exact = ideal(STAGES, self.in_flight)
        return ideal_of_patches(STAGES, steps, EXACT_STEPS, exact)

    @property
    def ideal(self) -> float:
        """The speed-up that its schedule has if nothing costs anything, in its steady state."""
        if self.alone:
            return 1.0
        if self.side != OWN or self.patches:
            return STAGES
        if self.requests > 1:
            return ideal_of_requests(STAGES, self.requests, self.in_flight)
        return ideal(STAGES, self.in_flight, self.virtual)

    def bytes_of_step(self, guided: GuidedPipeline, layers: int) -> tuple[float, ...]:
        """Bytes that arithmetic says each rank sends in a step of all requests."""
        if self.side != OWN:
            return (_ulysses().formula(guided),) * STAGES
        rows, parts = self.work.images // self.micro_batches, max(1, self.patches)
        flow = rows * guided.attention_bytes / layers
        flow += (parts - 1) * _carried_bytes(guided)
        return bytes_of_step(
            STAGES,
            self.virtual,
            self.requests * self.in_flight * parts,
            flow=flow / parts,
            result=rows * guided.prediction_bytes / parts,
        )


def _carried_bytes(guided: GuidedPipeline) -> int:
    """Of the text that goes with each patch but the first, where text goes through the blocks."""
    from omni_pp.pipefusion.application import plan_of
    from omni_pp.pipefusion.patch_plan import CARRIED_TEXT

    plan = plan_of(guided.pipeline.transformer)
    orders = {order for names in plan.attentions.values() for order in names.values()}
    return 0 if orders == {"image"} else attention_bytes(CARRIED_TEXT, torch.float32)


class Entrant:
    """A contestant with a pipeline of its own.

    Args:
        contestant: Who.
        guided: The pipeline, over weights that others share.
        costs: Of each block, in any unit.
    """

    def __init__(
        self, contestant: StageContestant, guided: GuidedPipeline, costs: tuple[float, ...]
    ) -> None:
        self.contestant, self.guided, self._costs = contestant, guided, costs
        self._handle: Any = None
        self._modules = list(guided.pipeline.transformer.modules())

    def apply(self) -> Callable[[], None]:
        """Make the pipeline parallel; returns what takes that back."""
        if self.contestant.alone:
            return lambda: None
        if self.contestant.side != OWN:
            return _ulysses().apply(self.guided)
        return applied(ParallelLayout(pp=STAGES), "cpu", self._cut)

    def _cut(self, state: Any) -> Any:
        from omni_pp.pipefusion import PipeFusionConfig, apply_pipefusion
        from omni_pp.pp_config import PipelineParallelConfig
        from omni_pp.stages.application import apply_pipeline_parallel

        config = PipelineParallelConfig(
            virtual_stages=self.contestant.virtual,
            micro_batches=self.contestant.micro_batches,
            balance=self._costs,
        )
        pipeline, patches = self.guided.pipeline, self.contestant.patches
        if patches:  # few steps are enough to time
            fusion = PipeFusionConfig(patches, EXACT_STEPS, force=True)
            self._handle = apply_pipefusion(pipeline, fusion, stages=config, state=state)
        else:
            self._handle = apply_pipeline_parallel(pipeline, config, state=state)
        return self._handle

    def run(self, steps: int) -> Tensor:
        """The latents of all images."""
        work, count = self.contestant.work, self.contestant.requests
        calls = [arguments(work.of(self.guided, request), steps) for request in range(count)]
        if count > 1 and self._handle is not None:
            found = [output[0] for output in self._handle.run_together(calls)]
        else:
            found = [self.guided.pipeline(**call)[0] for call in calls]
        return torch.cat(found)

    def weights(self) -> tuple[int, int]:
        """Bytes of the transformer's parameters on this rank, and those that stages promise.

        All modules that the transformer had at first are looked at, whether it shows them or not.
        """
        found = {p for module in self._modules for p in module.parameters(recurse=False)}
        held = sum(p.nbytes for p in found if not p.is_meta)
        if self._handle is None:
            return held, held
        (partition,) = self._handle.partitions.values()
        return held, partition.promised_bytes(partition.stage)


def _ulysses() -> GuidanceContestant:
    split = Contestant("omni-sp", "ulysses", ulysses=STAGES)
    return GuidanceContestant(split.side, split.mode, split)


def stage_contestants() -> list[StageContestant]:
    """Every contestant; of each work, the single process comes first."""
    return [
        StageContestant(ALONE, "unguided", UNGUIDED),
        StageContestant(ALONE, f"batch-{BATCH.images}", BATCH),
        StageContestant(OWN, "plain", UNGUIDED),
        StageContestant(OWN, "branches"),
        StageContestant(OWN, "virtual-2", virtual=2),
        StageContestant(OWN, "virtual-4", virtual=4),
        StageContestant(OWN, f"batch-{BATCH.images}", BATCH, micro_batches=BATCH.images),
        StageContestant(OWN, "requests-2", requests=2),
        StageContestant(OWN, "requests-3", requests=3),
        *(StageContestant(OWN, f"patches-{n}", UNGUIDED, patches=n) for n in PATCHES),
        StageContestant("omni-sp", "ulysses"),
    ]
