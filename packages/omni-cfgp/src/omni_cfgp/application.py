"""What is put on the modules and the pipeline, and taken off again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import ref

from torch import nn

from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.denoiser import Denoiser
from omni_cfgp.rounds import Rounds
from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_parallel_state.denoising.replaced_calls import Undo, call_below, give_call, real
from omni_parallel_state.denoising.requests import agree

_log = logging.getLogger("omni_cfgp")


def divide_denoiser(name: str, module: nn.Module, rounds: Rounds) -> Undo:
    """Have the calls of a module divided over ranks."""
    denoiser = Denoiser(name, ref(module), call_below(module))
    return give_call(module, lambda *args, **kwargs: rounds.call(denoiser, args, kwargs))


def watch_pipeline(
    pipeline: Any,
    denoisers: Mapping[str, nn.Module],
    rounds: Rounds,
    group: GroupCoordinator,
    config: CFGParallelConfig,
) -> Undo:
    """Have the ranks agree when a pipeline is called, and its results be real ones."""
    name, weak, below = type(pipeline).__name__, ref(pipeline), call_below(pipeline)
    modules = {name: ref(module) for name, module in denoisers.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        _check_denoisers(weak(), modules)
        rounds.begin()
        kwargs = agree(group, args, kwargs, config.seeds)
        output = below(*args, **kwargs)
        rounds.settle()
        if rounds.statistics.calls and not rounds.statistics.shared:
            _log.warning(
                "%s gave %d of the %d ranks of the cfg group nothing to do: its model is "
                "distilled, guidance was off (no negative prompt, a scale of 1), or it needs each "
                "prediction before it asks for the next",
                name,
                group.world_size - 1,
                group.world_size,
            )
        return real(output)

    return give_call(pipeline, call)


def _check_denoisers(pipeline: Any, modules: Mapping[str, ref[nn.Module]]) -> None:
    for name, weak in modules.items():
        found = getattr(pipeline, name, None)
        if found is weak():
            continue
        how = "remove the handle, replace it, apply again"
        if getattr(found, "_orig_mod", None) is weak():
            how = f"compile it before, or in place: pipeline.{name}.compile()"
        msg = (
            f"{name} of the pipeline was replaced after apply_cfg_parallel, so its calls would not "
            f"be divided; {how}"
        )
        raise ParallelError(msg)
