"""Guidance over ranks on an unmodified pipeline or denoiser."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from omni_cfgp.application import divide_denoiser, watch_pipeline
from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.rounds import Rounds
from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import Handle, ParallelState, get_parallel_state
from omni_parallel_state.denoising.names import DENOISERS
from omni_parallel_state.denoising.replaced_calls import Undo, watch_scheduler

_handles: WeakKeyDictionary[Any, Handle] = WeakKeyDictionary()


def apply_cfg_parallel(
    pipeline: Any, config: CFGParallelConfig | None = None, *, state: ParallelState | None = None
) -> Handle:
    """Compute the guidance branches of a pipeline on different ranks, with no change to its code.

    Every rank calls the pipeline alike and gets the same result. Works with pipelines that call
    their denoiser once for each branch and with those that make one batch of the branches, with
    guidance that is off at some steps, and with any number of branches and ranks. A step costs
    one collective, of the predictions.

    Args:
        pipeline: A pipeline of diffusers, or a denoiser alone: a transformer or a UNet.
        config: How branches are divided; default: by what the pipeline does.
        state: The ranks: its ``cfg`` group; default: the current state.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ParallelConfigError: The pipeline has no denoiser that is known, or is divided already.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    config = CFGParallelConfig() if config is None else config
    denoisers = _denoisers(pipeline, config)
    targets = [pipeline, *(module for module in denoisers.values() if module is not pipeline)]
    for target in targets:
        if target in _handles:
            msg = (
                f"the guidance of this {type(target).__name__} is divided over ranks already; "
                "call remove() of its handle first"
            )
            raise ParallelConfigError(msg)
    undo: list[Undo] = []
    if state.cfg.world_size > 1:  # one rank: the identity, at no cost
        try:
            _apply(pipeline, denoisers, state, config, undo)
        except BaseException:
            _undo(undo)
            raise
    taken = [ref(target) for target in targets]

    def remove() -> None:
        _undo(undo)
        for weak in taken:
            if (target := weak()) is not None:
                _handles.pop(target, None)

    handle = Handle(remove)
    for target in targets:
        _handles[target] = handle
    return handle


def _undo(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _apply(
    pipeline: Any,
    denoisers: dict[str, nn.Module],
    state: ParallelState,
    config: CFGParallelConfig,
    undo: list[Undo],
) -> None:
    rounds = Rounds(state.cfg, config)
    for name, module in denoisers.items():
        undo.append(divide_denoiser(name, module, rounds))
    if isinstance(pipeline, nn.Module):
        return
    if callable(getattr(getattr(pipeline, "scheduler", None), "step", None)):
        undo.append(watch_scheduler(pipeline.scheduler))
    undo.append(watch_pipeline(pipeline, denoisers, rounds, state.cfg, config))


def _denoisers(pipeline: Any, config: CFGParallelConfig) -> dict[str, nn.Module]:
    if isinstance(pipeline, nn.Module):
        return {type(pipeline).__name__: pipeline}
    names = config.denoisers or DENOISERS
    found = {name: getattr(pipeline, name, None) for name in names}
    missing = [name for name in config.denoisers if not isinstance(found[name], nn.Module)]
    modules: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, nn.Module) and all(module is not one for one in modules.values()):
            modules[name] = module  # under its first name
    if missing or not modules:
        here = sorted(
            name for name, value in vars(pipeline).items() if isinstance(value, nn.Module)
        )
        asked = f"has no module {', '.join(missing or names)}"
        msg = (
            f"{type(pipeline).__name__} {asked}; its modules: {', '.join(here) or 'none'}. Name "
            "those that predict noise in CFGParallelConfig(denoisers=...), or pass the module"
        )
        raise ParallelConfigError(msg)
    return modules
