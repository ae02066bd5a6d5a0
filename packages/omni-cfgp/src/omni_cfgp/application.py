"""What is put on the modules and the pipeline, and taken off again."""

from __future__ import annotations

import copyreg
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

from torch import nn

from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.denoiser import Denoiser
from omni_cfgp.requests import agree
from omni_cfgp.rounds import Rounds
from omni_cfgp.waiting import resolve, resolve_all
from omni_group_coordinator import GroupCoordinator, ParallelError

_log = logging.getLogger("omni_cfgp")
Undo = Callable[[], None]


class Divided:
    """Marks the classes that `give_call` makes."""

    _omni_original: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and saved objects are of the original class, which can be imported."""
        made, original = type(self), self._omni_original
        how: Any = super().__reduce_ex__(protocol)
        make = _blank if how[0] is copyreg.__newobj__ else how[0]  # type: ignore[attr-defined]
        return (make, tuple(original if arg is made else arg for arg in how[1]), *how[2:])


def _blank(cls: Any, *args: Any) -> Any:
    """An object whose state comes after; pickle's own way to it checks the class."""
    return cls.__new__(cls, *args)


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
    before = type(target)
    # One made of the class of a divided one has that class, and may be divided itself.
    cls = before._omni_original if issubclass(before, Divided) else before
    own = ref(target)

    @functools.wraps(cls.__call__)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if self is own() else cls.__call__(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members = names | {"__call__": called, "_omni_original": cls}
    subclass = type(cls.__name__, (Divided, cls), members)
    return _become(target, subclass, cls)


def _become(target: Any, subclass: type, cls: type) -> Undo:
    """Make an object an instance of a subclass; returns what makes it one of the class again."""
    weak = ref(target)
    target.__class__ = subclass

    def undo() -> None:
        alive = weak()
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
    pipeline: Any,
    denoisers: Mapping[str, nn.Module],
    rounds: Rounds,
    group: GroupCoordinator,
    config: CFGParallelConfig,
) -> Undo:
    """Have the ranks agree when a pipeline is called, and its results be real ones."""
    cls, weak = type(pipeline), ref(pipeline)
    modules = {name: ref(module) for name, module in denoisers.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        _check_denoisers(weak(), modules)
        rounds.begin()
        kwargs = agree(group, args, kwargs, config.seeds)
        output = cls.__call__(weak(), *args, **kwargs)
        rounds.settle()
        if rounds.statistics.calls and not rounds.statistics.shared:
            _log.warning(
                "%s gave %d of the %d ranks of the cfg group nothing to do: its model is "
                "distilled, guidance was off (no negative prompt, a scale of 1), or it needs each "
                "prediction before it asks for the next",
                cls.__name__,
                group.world_size - 1,
                group.world_size,
            )
        return _real(output)

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


def watch_scheduler(scheduler: Any) -> Undo:
    """Have a scheduler be given real predictions: it keeps them, and asks for their class."""
    cls = type(scheduler)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.step(self, *resolve_all(args), **resolve_all(kwargs))

    members = {"step": step, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _become(scheduler, type(cls.__name__, (cls,), members), cls)


def _real(output: Any) -> Any:
    """The output of a pipeline without anything that stands for a prediction."""
    if type(output) in (tuple, list, dict):
        return resolve_all(output)
    for name, value in list(getattr(output, "__dict__", {}).items()):
        found = resolve_all(value)
        if found is not value:
            setattr(output, name, found)
    return resolve(output)
