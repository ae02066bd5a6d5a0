"""One call that has ranks share the work of an unmodified pipeline."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_group_coordinator.utils import get_local_device
from omni_parallel.v1.legal_layouts import auto_config
from omni_parallel.v1.model_facts import ModelFacts
from omni_parallel.v1.parallel_config import ParallelConfig
from omni_parallel.v1.problems import validate
from omni_parallel.v1.strategies import Strategy, load_strategy
from omni_parallel_state import (
    Handle,
    ParallelState,
    destroy_distributed_environment,
    init_distributed_environment,
)
from omni_parallel_state.denoising.names import DENOISERS

LAYOUT_VARIABLE = "OMNI_PARALLEL_LAYOUT"
"""Environment variable that says what ranks share where a script names no configuration."""

_layouts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Denoisers whose work ranks share now, and how."""

_OWN = ("target", "config", "state", "_undo")
"""Attributes of `Parallelized` that are none of its pipeline."""

ConfigLike = ParallelConfig | str | Path | Mapping[str, Any] | None


class Parallelized(Handle):
    """A pipeline or module whose work ranks share, until `remove`.

    Called, it calls that; other attributes are those of it too, also where they are set. As a
    context manager it gives itself, and undoes everything at the end.

    Args:
        target: The pipeline or module.
        config: What ranks share.
        state: Their groups.
        stack: What undoes it.
    """

    def __init__(
        self, target: Any, config: ParallelConfig, state: ParallelState, stack: ExitStack
    ) -> None:
        super().__init__(stack.close)
        self.target = target
        self.config = config
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline or module: the same inputs on all ranks that share its work."""
        with self.state.use():
            return self.target(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "target":  # not there yet, as when it is unpickled
            raise AttributeError(name)
        return getattr(self.target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is set on the pipeline by way of this, such as its scheduler, is read there.
        own = name in _OWN or "target" not in self.__dict__
        setattr_of = super().__setattr__ if own else self.target.__setattr__
        setattr_of(name, value)


def parallelize(
    target: Any,
    config: ConfigLike = None,
    *,
    state: ParallelState | None = None,
    device: torch.device | str | None = None,
) -> Parallelized:
    """Have ranks share the work of a pipeline of diffusers, or of a module.

    Every rank of a script that torchrun started makes the same call, and then calls the pipeline
    with the same inputs. Everything is checked before anything is changed. Modules that are on the
    CPU are moved to the rank's device, once ranks have their share of them. In one process without
    torchrun nothing is shared, and nothing else is changed.

    Args:
        target: The pipeline, or the module; unmodified.
        config: What ranks share: a `ParallelConfig`, its short form ``cfg=2,ulysses=2``, a dict,
            a TOML or JSON file; ``"auto"``: `auto_config` chooses; None: what the environment
            variable ``OMNI_PARALLEL_LAYOUT`` says, else ``"auto"``.
        state: The groups of ranks; default: made for the configuration, and destroyed by the
            handle.
        device: Of this rank; default: the accelerator of the local rank if there is one.

    Returns:
        A handle that calls the pipeline, and undoes everything.

    Raises:
        ParallelConfigError: It cannot work; lists every problem and the nearest legal layouts.
            Nothing was changed.
    """
    _check_target(target)
    world_size = _world_size() if state is None else state.layout.world_size
    facts = ModelFacts.of(target)
    asked = os.environ.get(LAYOUT_VARIABLE, "auto") if config is None else config
    chosen = auto_config(world_size, facts) if asked == "auto" else ParallelConfig.of(asked)
    validate(chosen, world_size, facts)
    _check_place(target, device if state is None else state.device)
    strategies = {name: load_strategy(name) for name in chosen.strategies()}
    options = {name: chosen.options_of(name) for name in strategies}
    check_options(strategies, options)
    if world_size == 1:
        state = ParallelState(chosen.layout(1), device) if state is None else state
        _move(target, state.device)
        return Parallelized(target, chosen, state, ExitStack())
    with ExitStack() as stack:
        if state is None:
            state = _state_for(chosen, world_size, device)
            stack.callback(state.destroy)
        elif state.layout != chosen.layout(world_size):
            wanted = chosen.layout(world_size).describe()
            msg = f"{chosen} is\n{wanted}\nbut the state given has\n{state.layout.describe()}"
            raise ParallelConfigError(msg)
        for name, strategy in strategies.items():
            handle = strategy.apply(target, state, **options[name])
            stack.callback(handle.remove)
        _move(target, state.device)
        for module in _denoisers(target):
            _layouts[module] = str(chosen)
            stack.callback(_layouts.pop, module, None)
        return Parallelized(target, chosen, state, stack.pop_all())


def check_options(
    strategies: Mapping[str, Strategy], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse options that a strategy does not take, before any is applied.

    Those of this project take any here, and refuse what is no field of their configuration.

    Raises:
        ParallelConfigError: Names them, and those that it takes.
    """
    for name, given in options.items():
        parameters = inspect.signature(strategies[name].apply).parameters.values()
        if given and not any(one.kind is one.VAR_KEYWORD for one in parameters):
            legal = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
            unknown = sorted(set(given) - set(legal))
            if unknown:
                msg = (
                    f"strategy {name!r} takes no option {', '.join(unknown)}; legal: "
                    f"{', '.join(legal) or 'none'}"
                )
                raise ParallelConfigError(msg)


def _world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _state_for(
    config: ParallelConfig, world_size: int, device: torch.device | str | None
) -> ParallelState:
    if not dist.is_initialized():
        init_distributed_environment(device=device)
        # Not by the handle: torch's default group serves the layouts that follow in this process.
        atexit.register(destroy_distributed_environment)
    return ParallelState(config.layout(world_size), device)


def _components(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {DENOISERS[0]: target}
    components = getattr(target, "components", None)
    found = components if isinstance(components, Mapping) else getattr(target, "__dict__", {})
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _modules(target: Any) -> list[nn.Module]:
    return list(_components(target).values())


def _denoisers(target: Any) -> list[nn.Module]:
    return [module for name, module in _components(target).items() if name in DENOISERS]


def _check_target(target: Any) -> None:
    """Refuse what is no pipeline, and one whose work is shared already.

    Strategies that were applied one by one know of each other; of two layouts at once, each with
    groups of its own, none of them would.
    """
    if not _components(target):
        msg = (
            f"{target!r} is a {type(target).__name__}, which holds no module; legal: a pipeline "
            "that was loaded, such as what DiffusionPipeline.from_pretrained gives, or a module"
        )
        raise ParallelConfigError(msg)
    for module in _denoisers(target):
        if module in _layouts:
            msg = (
                f"the work of this {type(module).__name__} is shared already, as "
                f"{_layouts[module]}; call remove() of that handle, or leave its with block, first"
            )
            raise ParallelConfigError(msg)


def _check_place(target: Any, device: torch.device | str | None) -> None:
    """Refuse a pipeline that is on the accelerator of another rank of its host."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or not torch.accelerator.is_available():
        return
    own = get_local_device(int(local)) if device is None else torch.device(device)
    for module in _modules(target):
        for tensor in module.parameters():
            place = tensor.device
            elsewhere = None not in (own.index, place.index) and place.index != own.index
            if place.type not in ("cpu", "meta") and elsewhere:
                msg = (
                    f"{type(module).__name__} is on {place}, but this is local rank {local}; "
                    f"leave the pipeline on the CPU, which parallelize moves, or put it on {own}"
                )
                raise ParallelConfigError(msg)
            break


def _move(target: Any, device: torch.device) -> None:
    """Put modules that are on the CPU on a rank's device, but for those that others place."""
    if device.type == "cpu":
        return
    from torch.distributed.tensor import DTensor  # takes half a second to import

    for module in _modules(target):
        tensors = list(module.parameters())
        placed = hasattr(module, "_hf_hook") or any(isinstance(one, DTensor) for one in tensors)
        if not placed and all(tensor.device.type == "cpu" for tensor in tensors):
            module.to(device)
