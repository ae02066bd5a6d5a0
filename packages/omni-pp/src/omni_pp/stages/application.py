"""Stages on an unmodified pipeline or denoiser."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
)
from omni_parallel_state import ParallelState, get_parallel_state
from omni_parallel_state.denoising.names import DENOISERS
from omni_parallel_state.denoising.replaced_calls import (
    Undo,
    call_below,
    give_call,
    is_given_call,
    real,
    watch_scheduler,
)
from omni_parallel_state.denoising.requests import agree
from omni_pp.partition import PartitionedModel, distributed_weight, partition_of
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.agreement import agree_on
from omni_pp.stages.cutting import as_cut, check_caches, cut
from omni_pp.stages.micro_batches import MicroBatches
from omni_pp.stages.pipeline_handle import PipelineHandle
from omni_pp.stages.request_turns import RequestTurns
from omni_pp.stages.stage_link import StageLink
from omni_pp.stages.staged_denoiser import StagedDenoiser

_logger = logging.getLogger("omni_pp")
_handles: WeakKeyDictionary[Any, PipelineHandle] = WeakKeyDictionary()


def apply_pipeline_parallel(
    pipeline: Any,
    config: PipelineParallelConfig | None = None,
    *,
    state: ParallelState | None = None,
) -> PipelineHandle:
    """Cut the denoisers of a pipeline into stages, one on each rank, with no change to its code.

    Every rank calls the pipeline alike and gets the same result. Each holds the weights of its
    stage alone, beside those of the embedders and the head. Calls of the denoiser whose results
    are not needed yet (guidance branches), the rows of a batch, and requests that are run together
    (`PipelineHandle.run_together`) fill the pipeline. The result is that of one rank.

    A denoiser that is cut already, as `load_stage` and `partition_model` leave it, stays as it is
    cut, now and when the handle is removed.

    Args:
        pipeline: A pipeline of diffusers, or a denoiser alone.
        config: How it is cut; default: at equal cost.
        state: The ranks: its ``pp`` group; default: the current state.

    Returns:
        A handle that undoes it, which gathers the weights; also a context manager.

    Raises:
        ParallelConfigError: The pipeline has no denoiser that is known, its blocks cannot be
            found or cut so, it keeps features from step to step, it is cut already in another
            way, or another strategy has taken over its calls.
        RankMismatchError: The ranks were given different configurations.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    return apply_stages(pipeline, PipelineParallelConfig() if config is None else config, state)


def apply_stages(
    pipeline: Any,
    config: PipelineParallelConfig,
    state: ParallelState,
    batches: MicroBatches | None = None,
) -> PipelineHandle:
    """As `apply_pipeline_parallel`, with something else that cuts calls.

    Args:
        pipeline: A pipeline of diffusers, or a denoiser alone.
        config: How it is cut.
        state: The ranks.
        batches: What cuts calls; default: into micro-batches, as configured.
    """
    denoisers = find_denoisers(pipeline, config)
    targets = [pipeline, *(module for module in denoisers.values() if module is not pipeline)]
    for target in targets:
        if target in _handles:
            msg = (
                f"this {type(target).__name__} is cut into stages already; call remove() of its "
                "handle first"
            )
            raise ParallelConfigError(msg)
        if is_given_call(target):
            msg = (
                f"another strategy has taken over the calls of this {type(target).__name__}, and "
                "stages stand below it; legal: apply the stages first, then guidance over ranks"
            )
            raise ParallelConfigError(msg)
    config = as_cut(denoisers, state.pp, config)
    applied = Applied(pipeline, state.pp, state.sp, config, batches)
    if state.pp.world_size > 1:  # one rank: the identity, at no cost
        try:
            applied.apply(denoisers)
        except BaseException:
            applied.undo()
            raise
    weak_targets = [ref(target) for target in targets]

    def remove() -> None:
        applied.remove()
        for weak in weak_targets:
            if (target := weak()) is not None:
                _handles.pop(target, None)

    check = applied.check_removable
    handle = PipelineHandle(remove, pipeline, applied.turns, applied.partitions, check)
    for target in targets:
        _handles[target] = handle
    return handle


class Applied:
    """What was put on a pipeline, or a denoiser, and how it is taken off.

    Args:
        pipeline: The pipeline or the denoiser.
        group: The stages.
        shares: The ranks of one stage.
        config: How it is cut.
        batches: What cuts calls; default: into micro-batches, as configured.
    """

    def __init__(
        self,
        pipeline: Any,
        group: GroupCoordinator,
        shares: GroupCoordinator,
        config: PipelineParallelConfig,
        batches: MicroBatches | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._group = group
        self._shares = shares
        self._config = config
        self._undo: list[Undo] = []
        self._link = StageLink(group)
        self.turns = RequestTurns(group, config, self._link, batches)
        self.partitions: dict[str, PartitionedModel] = {}
        self._cut_here: list[PartitionedModel] = []

    def apply(self, denoisers: Mapping[str, nn.Module]) -> None:
        """Cut the denoisers, and have their calls and the pipeline's go through the stages."""
        there = {name: partition_of(module) for name, module in denoisers.items()}
        cuts = {name: part.boundaries for name, part in there.items() if part is not None}
        agree_on(self._group, (self._config, cuts) if cuts else self._config)
        self._link.open()
        for name, module in denoisers.items():
            check_caches(name, module)
        for name, module in denoisers.items():
            part = there[name]
            if part is None:
                part = cut(module, self._group, self._config)
                self._cut_here.append(part)
            self.partitions[name] = part
            self._stage(name, module)
        if isinstance(self._pipeline, nn.Module):
            return
        if callable(getattr(getattr(self._pipeline, "scheduler", None), "step", None)):
            self._undo.append(watch_scheduler(self._pipeline.scheduler))
        weak = {name: ref(module) for name, module in denoisers.items()}
        self._watch_pipeline(weak)

    def _stage(self, name: str, module: nn.Module) -> None:
        denoiser = StagedDenoiser(
            name, self.partitions[name], call_below(module), self._group, self._link
        )
        turns = self.turns
        call = give_call(module, lambda *args, **kwargs: turns.rounds.call(denoiser, args, kwargs))
        self._undo.append(call)

    def _watch_pipeline(self, denoisers: Mapping[str, ref[nn.Module]]) -> None:
        weak, below = ref(self._pipeline), call_below(self._pipeline)

        def call(*args: Any, **kwargs: Any) -> Any:
            _check_denoisers(weak(), denoisers)
            rounds = self.turns.rounds
            rounds.begin()
            for group in (self._shares, self._group):
                if group.world_size > 1:
                    kwargs = agree(group, args, kwargs, self._config.seeds)
            output = below(*args, **kwargs)
            rounds.settle()
            return real(output)

        self._undo.append(give_call(self._pipeline, call))

    def undo(self) -> None:
        """Take everything off but the partition of weights, of which others may know nothing."""
        while self._undo:
            self._undo.pop()()

    def check_removable(self) -> None:
        """Look whether weights can be given back.

        Raises:
            ParallelError: The ranks of a stage share them.
        """
        for partition in self._cut_here:
            if (name := distributed_weight(partition.model)) is not None:
                msg = (
                    f"the ranks of a stage share the weights of {type(partition.model).__name__} "
                    f"({name} is distributed), so that a stage cannot give them to others; call "
                    "remove_hsdp() first, and then remove() again"
                )
                raise ParallelError(msg)

    def remove(self) -> None:
        """Give everything back; a collective, for the weights come from the stages that hold them.

        Raises:
            ParallelError: The group was destroyed meanwhile, so the weights cannot be gathered.
        """
        self.undo()
        if self._cut_here and (error := sys.exception()) is not None:
            _logger.error(
                "stages are given back after %s: %s; this waits for all other ranks",
                type(error).__name__,
                error,
            )
        for partition in self._cut_here:
            for owner, tensor in partition.materialize(self._group.device):
                with torch.no_grad():
                    self._group.broadcast(tensor, src=owner)
            partition.restore()
        self._cut_here.clear()
        self.partitions.clear()


def find_denoisers(pipeline: Any, config: PipelineParallelConfig) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name.

    Raises:
        ParallelConfigError: There is none.
    """
    if isinstance(pipeline, nn.Module):
        return {type(pipeline).__name__: pipeline}
    names: Sequence[str] = config.denoisers or DENOISERS
    found = {name: getattr(pipeline, name, None) for name in names}
    missing = [name for name in config.denoisers if not isinstance(found[name], nn.Module)]
    modules: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, nn.Module) and all(module is not one for one in modules.values()):
            modules[name] = module
    if missing or not modules:
        msg = (
            f"{type(pipeline).__name__} has no component {', '.join(missing or names)} that is a "
            "module; name those that predict noise in denoisers="
        )
        raise ParallelConfigError(msg)
    return modules


def _check_denoisers(pipeline: Any, modules: Mapping[str, Callable[[], nn.Module | None]]) -> None:
    for name, weak in modules.items():
        found = getattr(pipeline, name, None)
        if found is not weak():
            how = "remove the handle, replace it, apply again"
            msg = (
                f"{name} of the pipeline was replaced after apply_pipeline_parallel, so it would "
                f"not be cut into stages; {how}"
            )
            raise ParallelError(msg)
