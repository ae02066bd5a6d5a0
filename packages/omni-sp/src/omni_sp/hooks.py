"""Sequence parallelism on an unmodified model, by a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import Handle, ParallelState, get_parallel_state
from omni_parallel_state.rebinding import is_rebound, subclass_with
from omni_sp.application import Application
from omni_sp.applied_plan import AppliedPlan, apply_plan, attention_owner
from omni_sp.attention_site import AttentionSite
from omni_sp.convolution import ConvolvedRows
from omni_sp.local_attention import LocalAttention
from omni_sp.plan_checks import validate_sp_plan
from omni_sp.plan_entries import SequenceParallelModelPlan
from omni_sp.plan_source import get_sp_plan_from_model
from omni_sp.planned_module import PlannedModule
from omni_sp.region_forward import RegionForward
from omni_sp.sp_config import SequenceParallelConfig

Undo = list[Callable[[], object]]

_handles: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()
_COPY = (
    "the module is a copy of a sequence-parallel model: it is parallel and stays so, for a handle "
    "belongs to the original; call remove() of that one's handle before copying, then apply to each"
)


def apply_sequence_parallel(
    module: nn.Module,
    config: SequenceParallelConfig,
    plan: SequenceParallelModelPlan | None = None,
    *,
    state: ParallelState | None = None,
) -> Handle:
    """Split the sequence of a model over the ranks, with no change to its code.

    Every rank calls the model with the same whole inputs and gets the same whole output. What an
    attention layer sends is `attention_volume`. Works under ``torch.compile(fullgraph=True)``, of
    the model or of its blocks, compiled after or before.

    Args:
        module: The transformer (not the pipeline), or what ``torch.compile`` made of it.
        config: How attention is computed; its degrees are those of the state.
        plan: What to split, gather and attend over; default: the model's own, or the one known
            for its class.
        state: The ranks; default: the current state.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ParallelConfigError: The plan does not fit the model, there is none, the degrees are not
            those of the state, or the module, a part of it or what it is a part of is parallel
            already.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    config.check_degrees(state)
    module = _uncompiled(module)
    _check_apart(module)
    plan = get_sp_plan_from_model(module) if plan is None else plan
    if plan is None:
        msg = (
            f"no sequence-parallel plan is known for {type(module).__name__}; pass plan=, or set "
            "the attribute _sp_plan on the model"
        )
        raise ParallelConfigError(msg)
    validate_sp_plan(plan, module)
    undo: Undo = []
    if state.sp.world_size > 1:  # one rank: the identity, at no cost
        applied = apply_plan(plan, module)
        application = Application(state.sp, config.order, applied.masks())
        try:
            _apply(module, applied, application, config, undo)
        except BaseException:
            _undo(undo)
            raise
    model = ref(module)

    def remove() -> None:
        _undo(undo)
        if (alive := model()) is not None:
            _handles.pop(alive, None)

    _handles[module] = handle = Handle(remove)
    return handle


def remove_sequence_parallel(module: nn.Module) -> None:
    """Undo `apply_sequence_parallel`.

    Raises:
        ParallelConfigError: The module is not sequence-parallel, or a copy of one that is.
    """
    module = _uncompiled(module)
    handle = _handles.get(module)
    if handle is None and _runs_parallel(module):
        raise ParallelConfigError(_COPY)
    if handle is None:
        msg = "the module is not sequence-parallel: apply_sequence_parallel was not called on it"
        raise ParallelConfigError(msg)
    handle.remove()


def _uncompiled(module: nn.Module) -> nn.Module:
    """The model that a wrapper by ``torch.compile`` calls; torch has no public name for it."""
    inner = getattr(module, "_orig_mod", None)
    return _uncompiled(inner) if isinstance(inner, nn.Module) else module


def _runs_parallel(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, RegionForward) and forward.enabled


def _check_apart(module: nn.Module) -> None:
    """Check that neither the module nor anything in it or around it is parallel."""
    if module in _handles:
        msg = "the module is sequence-parallel already; call remove() of its handle first"
        raise ParallelConfigError(msg)
    if _runs_parallel(module):
        raise ParallelConfigError(_COPY)
    for name, part in module.named_modules():
        if part in _handles or _runs_parallel(part):
            msg = (
                f"the module holds {name!r}, a {type(part).__name__}, which is sequence-parallel "
                "already, and whose tokens would be split twice; call remove() of its handle "
                "first, or apply to what does not hold it"
            )
            raise ParallelConfigError(msg)
    for model in list(_handles):
        for name, part in model.named_modules():
            if part is module:
                msg = (
                    f"the module is {name!r} of a {type(model).__name__} that is sequence-parallel "
                    "already, and its tokens would be split twice; call remove() of that model's "
                    "handle first"
                )
                raise ParallelConfigError(msg)


def _undo(undo: Undo) -> None:
    while undo:
        undo.pop()()


def _apply(
    model: nn.Module,
    applied: AppliedPlan,
    application: Application,
    config: SequenceParallelConfig,
    undo: Undo,
) -> None:
    for name in applied.modules:
        application.watch_place(model, name)
    for name, plan in applied.attentions.items():
        site = AttentionSite(name, plan, application, config)
        undo.append(_take_over(applied.modules[name], site))
        if isinstance(stand_in := attention_owner(applied.modules[name]), nn.Module):
            continue
        application.watch(applied.modules[name], name, stand_in)
    for name, entry in applied.convolutions.items():
        rows = ConvolvedRows(name, applied.modules[name], entry, application)
        undo += [hook.remove for hook in rows.hook(applied.modules[name])]
    for name in applied.local:
        local = LocalAttention(name, applied.modules[name], application)
        undo += [hook.remove for hook in local.hook(applied.modules[name])]
    root: PlannedModule | None = None
    for name, entries in applied.entries.items():
        part = PlannedModule(name, applied.modules[name], application)
        for planned in entries:
            part.add(planned)
        if name:
            undo += [hook.remove for hook in _hook(applied.modules[name], part)]
        else:
            root = part
    # Weak, so that the table of handles does not keep the model alive.
    give_back = WeakMethod(RegionForward(model, root, application).give_back)
    undo.append(lambda: _call(give_back()))


def _call(function: Callable[[], None] | None) -> None:
    if function is not None:
        function()


def _hook(target: nn.Module, part: PlannedModule) -> list[RemovableHandle]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return part.split_inputs(args, kwargs)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return part.change_outputs(args, kwargs, output)

    hooks = []
    if part.has_inputs:
        hooks.append(target.register_forward_pre_hook(before, with_kwargs=True))
    if part.has_outputs:
        hooks.append(target.register_forward_hook(after, with_kwargs=True))
    return hooks


def _take_over(module: nn.Module, site: AttentionSite) -> Callable[[], None]:
    """Have the attention calls of a module made by a site; returns what undoes it."""
    owner = attention_owner(module)
    cls = type(owner)
    if is_rebound(owner):
        msg = (
            f"the attention of a {type(module).__name__} was taken over before, as PipeFusion does "
            "(which shares tokens over the sp group itself); remove that handle first"
        )
        raise ParallelConfigError(msg)
    subclass = subclass_with(cls, site.replacement)
    if subclass is None:
        msg = f"{cls.__name__} makes no attention call that could be taken over"
        raise ParallelConfigError(msg)
    site.prepare(getattr(owner, "_attention_backend", None))
    if isinstance(owner, nn.Module):
        owner.__class__ = subclass
        weak_owner = ref(owner)
        return lambda: _set_class(weak_owner(), subclass, cls)
    # Not the processor itself: several modules may share one. They go on sharing its attributes.
    stand_in = copy.copy(owner)
    stand_in.__class__ = subclass
    stand_in.__dict__ = owner.__dict__
    module.processor = stand_in
    weak_module = ref(module)
    return lambda: _set_processor(weak_module(), stand_in, owner)


def _set_class(owner: nn.Module | None, subclass: type, cls: type) -> None:
    if owner is not None and type(owner) is subclass:
        owner.__class__ = cls


def _set_processor(module: nn.Module | None, stand_in: object, owner: object) -> None:
    if module is not None and getattr(module, "processor", None) is stand_in:
        module.processor = owner  # type: ignore[assignment]
