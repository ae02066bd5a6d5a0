"""PipeFusion on an unmodified pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from torch import nn

from omni_group_coordinator import (
    ParallelConfigError,
    ParallelError,
)
from omni_parallel_state import Handle, ParallelState, get_parallel_state
from omni_parallel_state.denoising.replaced_calls import call_below, give_call
from omni_pp.partition import PartitionedModel, find_block_lists
from omni_pp.pipefusion.attention_site import take_over
from omni_pp.pipefusion.computed_once import modules_named
from omni_pp.pipefusion.known_plans import KNOWN_PLANS
from omni_pp.pipefusion.patch_batches import PatchBatches
from omni_pp.pipefusion.patch_plan import PatchPlan
from omni_pp.pipefusion.patched_denoiser import PatchedDenoiser, sites_of
from omni_pp.pipefusion.patchwise import real_output
from omni_pp.pipefusion.pipefusion_config import PipeFusionConfig
from omni_pp.pipefusion.quality import check_steps
from omni_pp.pipefusion.request_clock import RequestClock
from omni_pp.pipefusion.schedulers import check_scheduler
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.agreement import agree_on
from omni_pp.stages.application import apply_stages, find_denoisers

Undo = Callable[[], None]


class PipeFusionHandle(Handle):
    """Undoes PipeFusion and the stages of a pipeline.

    Args:
        undo: Called once, by the first `remove`.
        batches: What cuts calls; ``None`` on one rank.
        partitions: The models that were cut into stages, by name; empty on one rank.

    Attributes:
        partitions: As given.
    """

    def __init__(
        self,
        undo: Undo,
        batches: PatchBatches | None,
        partitions: Mapping[str, PartitionedModel],
    ) -> None:
        super().__init__(undo)
        self._batches = batches
        self.partitions = partitions

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank holds.

        They are of the blocks of its stage, of all tokens, for each guidance branch.
        """
        return 0 if self._batches is None else self._batches.cache_bytes


def apply_pipefusion(
    pipeline: Any,
    config: PipeFusionConfig | None = None,
    *,
    stages: PipelineParallelConfig | None = None,
    state: ParallelState | None = None,
) -> PipeFusionHandle:
    """Cut the denoisers of a pipeline into stages, and after exact steps their calls into patches.

    As `apply_pipeline_parallel`, with no change to the pipeline's code, but a call's image tokens
    go through the stages patch by patch, so that all stages work on one image; the patches of the
    next step follow those of this one without a pause, as long as the pipeline and its scheduler
    treat each element of the latents alone. A patch attends to
    keys and values of the step before where those of this step are not known yet: of the patches
    after it (Fang et al., arXiv 2405.14430). So the result is not that of one rank, but it depends
    on patches and steps alone: not on the number of stages, nor on how they are cut. It equals the
    exact one, up to rounding, where all steps are exact ones or there is one patch. The ranks of an
    ``sp`` group share the tokens of each patch and give each other the fresh keys and values, by an
    all-gather whatever its degrees; omni-sp must not split them as well.

    Args:
        pipeline: A pipeline of diffusers, whose denoisers are of classes that are known
            (`KNOWN_PLANS`) and whose scheduler treats each element alone.
        config: How calls are cut; default: two patches after one exact step.
        stages: How the denoisers are cut; its ``micro_batches`` are not used.
        state: The ranks: its ``pp`` and ``sp`` groups; default: the current state.

    Returns:
        A handle that undoes it, which gathers the weights; also a context manager.

    Raises:
        ParallelConfigError: A denoiser's class, its attention, or the scheduler is not known to
            allow it; or the stages cannot be cut so. Nothing was changed.
        RankMismatchError: The ranks were given different configurations.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    config = PipeFusionConfig() if config is None else config
    stages = PipelineParallelConfig() if stages is None else stages
    plans = _plans(pipeline, stages)
    if state.pp.world_size == 1:  # the identity, at no cost
        return PipeFusionHandle(lambda: None, None, {})
    agree_on(state.pp, config)
    agree_on(state.sp, config, "rank of a stage")
    return fuse(pipeline, config, stages, state, plans)


def fuse(
    pipeline: Any,
    config: PipeFusionConfig,
    stages: PipelineParallelConfig,
    state: ParallelState,
    plans: Mapping[str, PatchPlan],
) -> PipeFusionHandle:
    """What `apply_pipefusion` does after its checks."""
    clock = RequestClock()
    batches = PatchBatches(config, clock, state.sp)
    handle = apply_stages(pipeline, stages, state, batches)
    partitions = dict(handle.partitions)
    undo: list[Undo] = []

    def remove() -> None:
        while undo:
            undo.pop()()
        batches.drop()
        handle.remove()

    try:
        for name, partition in partitions.items():
            patched = PatchedDenoiser(name, partition, plans[name])
            undo.append(patched.remove)
            patched.install()
            batches.denoisers[name] = patched
        undo.append(clock.watch(pipeline.scheduler))
        undo.append(_watch_pipeline(pipeline, config, clock, batches))
    except BaseException:
        remove()
        raise
    return PipeFusionHandle(remove, batches, partitions)


def _watch_pipeline(
    pipeline: Any, config: PipeFusionConfig, clock: RequestClock, batches: PatchBatches
) -> Undo:
    weak, below, scheduler = ref(pipeline), call_below(pipeline), ref(pipeline.scheduler)
    parameters = list(inspect.signature(type(pipeline).__call__).parameters.values())[1:]

    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(weak(), "scheduler", None) is not scheduler():
            msg = (
                "the scheduler of the pipeline was replaced after apply_pipefusion, so its steps "
                "would not be counted; remove the handle, replace it, apply again"
            )
            raise ParallelError(msg)
        defaults = {one.name: one.default for one in parameters}
        given = dict(zip(defaults, args, strict=False)) | kwargs
        check_steps(config, defaults | given)
        clock.begin()
        output = real_output(below(*args, **kwargs))
        batches.ledger.settle()
        return output

    return give_call(pipeline, call)


def _plans(pipeline: Any, stages: PipelineParallelConfig) -> dict[str, PatchPlan]:
    """The plan of each denoiser, put to the model to see whether it fits."""
    if isinstance(pipeline, nn.Module) or not hasattr(pipeline, "scheduler"):
        msg = (
            f"PipeFusion counts the steps of a pipeline's scheduler, and a "
            f"{type(pipeline).__name__} has none; apply it to the pipeline"
        )
        raise ParallelConfigError(msg)
    check_scheduler(pipeline.scheduler)
    plans = {}
    for name, module in find_denoisers(pipeline, stages).items():
        plans[name] = plan_of(module)
        check_model(module, plans[name])
    return plans


def plan_of(model: nn.Module) -> PatchPlan:
    """How a model is cut along its image tokens.

    Raises:
        ParallelConfigError: Its class is not known.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in KNOWN_PLANS and cls.__module__.partition(".")[0] == "diffusers":
            return KNOWN_PLANS[cls.__name__]
    msg = (
        f"PipeFusion does not know how {type(model).__name__} is cut along its image tokens: "
        f"looked for its class, and those that it derives from, among the ones of diffusers "
        f"{', '.join(sorted(KNOWN_PLANS))}; apply_pipeline_parallel needs no such knowledge"
    )
    raise ParallelConfigError(msg)


def check_model(model: nn.Module, plan: PatchPlan) -> None:
    """Look whether a model has the modules that a plan names.

    Raises:
        ParallelConfigError: It lacks one, or its attention is not known.
    """
    for found in find_block_lists(model):
        if found.name not in plan.attentions:
            msg = f"{found.name} of {type(model).__name__} is a list that PipeFusion does not know"
            raise ParallelConfigError(msg)
        for key, block in model.get_submodule(found.name).named_children():
            for site, _ in sites_of(plan, f"{found.name}.{key}", block):
                take_over(model.get_submodule(site), None, site)
    modules_named(model, plan.head)
