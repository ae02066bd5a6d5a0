"""Sequence parallelism on an unmodified model, by a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelState, get_parallel_state
from omni_sp.handle import Handle
from omni_sp.planned_module import PlannedModule, find_module
from omni_sp.region_forward import RegionForward
from omni_sp.sp_plan import (
    SequenceParallelConfig,
    SequenceParallelModelPlan,
    get_sp_plan_from_model,
    validate_sp_plan,
)

_handles: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()


def apply_sequence_parallel(
    module: nn.Module,
    config: SequenceParallelConfig,
    plan: SequenceParallelModelPlan | None = None,
    *,
    state: ParallelState | None = None,
) -> Handle:
    """Split the sequence of a model over the ranks, with no change to its code.

    Every rank calls the model with the same whole inputs and gets the same whole output. Each
    attention layer costs a rank an all-to-all of query, key and value and one of the result:
    ``4 (P - 1) / P**2`` times the bytes of a whole query for P ranks.

    Args:
        module: The transformer (not the pipeline).
        config: How attention is computed; its degrees are those of the state.
        plan: What to split and gather; default: the model's own, or the one known for its class.
        state: The ranks; default: the current state.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ParallelConfigError: The plan does not fit the model, there is none, the degrees are not
            those of the state, or the module is parallel already.
        RuntimeError: No state was given and none is current.
    """
    state = get_parallel_state() if state is None else state
    _check_degrees(config, state)
    if module in _handles:
        msg = "the module is sequence-parallel already; call remove() of its handle first"
        raise ParallelConfigError(msg)
    plan = get_sp_plan_from_model(module) if plan is None else plan
    if plan is None:
        msg = (
            f"no sequence-parallel plan is known for {type(module).__name__}; pass plan=, or set "
            "the attribute _sp_plan on the model"
        )
        raise ParallelConfigError(msg)
    validate_sp_plan(plan)
    planned = {
        name: PlannedModule(name, find_module(module, name), entry) for name, entry in plan.items()
    }
    undo: list[Callable[[], object]] = []
    if state.sp.world_size > 1:  # one rank: the identity, at no cost
        undo += [
            hook.remove
            for name, part in planned.items()
            if name
            for hook in _hook(find_module(module, name), part)
        ]
        # Weak, so that the table of handles does not keep the model alive.
        give_back = WeakMethod(RegionForward(module, planned.get(""), state.sp).give_back)
        undo.append(lambda: _call(give_back()))
    model = ref(module)

    def remove() -> None:
        for call in undo:
            call()
        if (alive := model()) is not None:
            _handles.pop(alive, None)

    _handles[module] = handle = Handle(remove)
    return handle


def remove_sequence_parallel(module: nn.Module) -> None:
    """Undo `apply_sequence_parallel`.

    Raises:
        ParallelConfigError: The module is not sequence-parallel.
    """
    handle = _handles.get(module)
    if handle is None:
        msg = "the module is not sequence-parallel: apply_sequence_parallel was not called on it"
        raise ParallelConfigError(msg)
    handle.remove()


def _call(function: Callable[[], None] | None) -> None:
    if function is not None:
        function()


def _check_degrees(config: SequenceParallelConfig, state: ParallelState) -> None:
    asked = (config.ulysses_degree, config.ring_degree)
    layout = (state.layout.ulysses, state.layout.ring)
    if asked != layout:
        msg = (
            f"ulysses_degree={asked[0]}, ring_degree={asked[1]}, but the parallel state was made "
            f"with ulysses={layout[0]}, ring={layout[1]}; both must say the same"
        )
        raise ParallelConfigError(msg)


def _hook(target: nn.Module, part: PlannedModule) -> tuple[RemovableHandle, RemovableHandle]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return part.split_inputs(args, kwargs)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return part.change_outputs(output)

    return (
        target.register_forward_pre_hook(before, with_kwargs=True),
        target.register_forward_hook(after),
    )
