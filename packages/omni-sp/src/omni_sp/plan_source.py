"""Where the plan of a model comes from: the model, diffusers, or what is known of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_sp.plan_checks import validate_sp_plan
from omni_sp.plan_entries import (
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)


def get_sp_plan_from_model(model: nn.Module) -> SequenceParallelModelPlan | None:
    """The plan of a model.

    Its attribute ``_sp_plan``, else the one known for its class, else its ``_cp_plan``, which
    diffusers declares for its own context parallelism, converted.

    Returns:
        ``None`` if there is none of them.

    Raises:
        ParallelConfigError: The model's own plan is malformed, or its class is known to be one
            that cannot be sequence-parallel.
    """
    from omni_sp.plans import KNOWN_PLANS

    own = getattr(model, "_sp_plan", None)
    if own is not None:
        validate_sp_plan(own)
        return own  # type: ignore[no-any-return]
    for cls in type(model).__mro__:
        if cls.__name__ in KNOWN_PLANS:
            return KNOWN_PLANS[cls.__name__]
    declared = getattr(model, "_cp_plan", None)
    return None if declared is None else converted_plan(declared, model)


def converted_plan(
    declared: Mapping[str, Any], model: nn.Module | None = None
) -> SequenceParallelModelPlan:
    """A plan in diffusers' terms (``_cp_plan``) in those of this package.

    diffusers does not say which tensors are tokens that attend: it is taken to be those of three
    dimensions whose parameter ends in ``hidden_states``. A plan for which that is not so is to be
    written out.

    Args:
        declared: The plan.
        model: The model that it is for. An attribute of its class, the plan may number more blocks
            than this model has: entries for those are left out.

    Raises:
        ParallelConfigError: The plan holds something else than diffusers' entries.
    """
    if model is not None:
        declared = _within(declared, model)
    plan: dict[str, Any] = {}
    for name, entry in declared.items():
        if isinstance(entry, Mapping):
            plan[name] = {key: _converted(name, key, value) for key, value in entry.items()}
        elif isinstance(entry, list | tuple):
            plan[name] = tuple(_converted(name, None, value) for value in entry)
        else:
            plan[name] = _converted(name, None, entry)
    streams = [
        key
        for entry in plan.values()
        if isinstance(entry, Mapping)
        for key, value in entry.items()
        if getattr(value, "attends", False)
    ]
    if "hidden_states" in streams:  # what diffusers gathers is the image, which has this name
        plan = {name: _belonging(entry) for name, entry in plan.items()}
    validate_sp_plan(plan)
    return plan


def _within(declared: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A plan without entries for blocks that a list is too short for, if it has others of them."""
    series = {name: _beyond(name, model) for name in declared}
    present = {_numberless(name) for name, beyond in series.items() if not beyond}
    return {
        name: entry
        for name, entry in declared.items()
        if not (series[name] and _numberless(name) in present)
    }


def _beyond(name: str, model: nn.Module) -> bool:
    """Whether a name numbers a module of a list that has less of them."""
    module: nn.Module | None = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList) and part.isdecimal() and int(part) >= len(module):
            return True
        module = None if module is None else module._modules.get(part)
    return False


def _numberless(name: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def _converted(name: str, key: object, entry: Any) -> Any:
    if entry is None:
        return None
    if isinstance(entry, list | tuple):
        return tuple(_converted(name, key, item) for item in entry)
    if hasattr(entry, "gather_dim"):
        return SequenceParallelOutput(entry.gather_dim, entry.expected_dims)
    if hasattr(entry, "split_dim"):
        tokens = isinstance(key, str) and key.endswith("hidden_states")
        return SequenceParallelInput(
            entry.split_dim,
            entry.expected_dims,
            split_output=bool(entry.split_output),
            attends=tokens and entry.expected_dims in (3, None),
        )
    msg = (
        f"module {name!r}: {entry!r} in the model's _cp_plan is neither an input with split_dim "
        "nor an output with gather_dim; pass plan= instead"
    )
    raise ParallelConfigError(msg)


def _belonging(entry: Any) -> Any:
    if isinstance(entry, SequenceParallelOutput):
        return SequenceParallelOutput(entry.gather_dim, entry.expected_dims, like="hidden_states")
    if isinstance(entry, tuple):
        return tuple(_belonging(item) for item in entry)
    return entry
