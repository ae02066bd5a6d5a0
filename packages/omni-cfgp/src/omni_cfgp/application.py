"""What is put on the modules and the pipeline, and taken off again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import nn

from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.deferred import resolve, resolve_all
from omni_cfgp.denoiser import Denoiser
from omni_cfgp.requests import agree
from omni_cfgp.rounds import Rounds
from omni_group_coordinator import GroupCoordinator

_log = logging.getLogger("omni_cfgp")
Undo = Callable[[], None]


class Divided:
    """Marks the classes that `give_call` makes."""


def give_call(target: Any, call: Callable[..., Any]) -> Undo:
    """Make one object be called otherwise, and no other of its class.

    Python looks ``__call__`` up on the class, so the object gets a subclass, of the same name.
    A copy of it is called as the original class says.

    Args:
        target: The object.
        call: Called in its place, with its arguments.

    Returns:
        Gives it its class back.
    """
    cls = type(target)
    own = ref(target)

    @functools.wraps(cls.__call__)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if self is own() else cls.__call__(self, *args, **kwargs)

    members = {"__call__": called, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    subclass = type(cls.__name__, (Divided, cls), members)
    target.__class__ = subclass

    def undo() -> None:
        alive = own()
        if alive is not None and type(alive) is subclass:
            alive.__class__ = cls

    return undo


def divide_denoiser(name: str, module: nn.Module, rounds: Rounds) -> Undo:
    """Have the calls of a module divided over ranks."""
    cls, weak = type(module), ref(module)

    def original(*args: Any, **kwargs: Any) -> Any:
        return cls.__call__(weak(), *args, **kwargs)

    denoiser = Denoiser(name, weak, original)
    return give_call(module, lambda *args, **kwargs: rounds.call(denoiser, args, kwargs))


def watch_pipeline(
    pipeline: Any, rounds: Rounds, group: GroupCoordinator, config: CFGParallelConfig
) -> Undo:
    """Have the ranks agree when a pipeline is called, and its results be real ones."""
    cls, weak = type(pipeline), ref(pipeline)

    def call(*args: Any, **kwargs: Any) -> Any:
        rounds.begin()
        kwargs = agree(group, args, kwargs, config.seeds)
        output = cls.__call__(weak(), *args, **kwargs)
        rounds.settle()
        if rounds.statistics.calls and not rounds.statistics.shared:
            _log.warning(
                "%s made one guidance branch of one row at a time: its model is distilled, or "
                "guidance was off (no negative prompt, a scale of 1), so %d of the %d ranks of "
                "the cfg group had nothing to do",
                cls.__name__,
                group.world_size - 1,
                group.world_size,
            )
        return _real(output)

    return give_call(pipeline, call)


def watch_scheduler(scheduler: Any) -> Undo:
    """Have a scheduler be given real predictions: it keeps them, and asks for their class."""
    cls = type(scheduler)
    own = ref(scheduler)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.step(self, *resolve_all(args), **resolve_all(kwargs))

    members = {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    subclass = type(cls.__name__, (cls,), members)
    scheduler.__class__ = subclass

    def undo() -> None:
        alive = own()
        if alive is not None and type(alive) is subclass:
            alive.__class__ = cls

    return undo


def _real(output: Any) -> Any:
    """The output of a pipeline without anything that stands for a prediction."""
    if type(output) in (tuple, list, dict):
        return resolve_all(output)
    for name, value in list(getattr(output, "__dict__", {}).items()):
        found = resolve_all(value)
        if found is not value:
            setattr(output, name, found)
    return resolve(output)
