"""A plan put to a model: which module gets what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.rebinding import is_dispatch, subclass_with
from omni_sp.modules import find_modules
from omni_sp.plan_entries import (
    LOCAL_ATTENTION,
    InputPlan,
    OutputPlan,
    SequenceParallelAttention,
    SequenceParallelConvolution,
    SequenceParallelModelPlan,
)
from omni_sp.planned_module import PlannedModule


@dataclass
class AppliedPlan:
    """The entries of a plan by the modules that they are for, all names resolved."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    entries: dict[str, list[InputPlan | OutputPlan]] = field(default_factory=dict)
    """Inputs and outputs of each module."""
    attentions: dict[str, SequenceParallelAttention] = field(default_factory=dict)
    """What attends over a split sequence."""
    local: list[str] = field(default_factory=list)
    """Names of the modules whose attention is local by the plan."""
    convolutions: dict[str, SequenceParallelConvolution] = field(default_factory=dict)

    def masks(self) -> frozenset[str]:
        """Names of the split inputs that are key masks."""
        return frozenset(mask for plan in self.attentions.values() for mask in plan.masks.values())


def apply_plan(plan: SequenceParallelModelPlan, model: nn.Module) -> AppliedPlan:
    """Find the modules of a plan, and the attention that no entry names.

    Raises:
        ParallelConfigError: A module is missing, or has no attention where the plan says so.
    """
    applied = AppliedPlan()
    named: dict[str, SequenceParallelAttention] = {}
    for pattern, entry in plan.items():
        for name, module in find_modules(model, pattern):
            applied.modules[name] = module
            if isinstance(entry, SequenceParallelAttention):
                named[name] = entry
            elif isinstance(entry, SequenceParallelConvolution):
                applied.convolutions[name] = entry
            else:
                applied.entries.setdefault(name, []).append(entry)
    known: dict[type, bool] = {}
    for name, module in model.named_modules():
        crosses = name not in named and getattr(module, "is_cross_attention", False)
        if crosses or named.get(name) == LOCAL_ATTENTION:
            applied.local.append(name)
            applied.modules[name] = module
            continue
        attention = _attention_of(name, module, named, known)
        if attention is not None:
            applied.attentions[name] = attention
            applied.modules[name] = module
    if not applied.attentions:
        msg = (
            f"no module of {type(model).__name__} calls torch's scaled_dot_product_attention or "
            "diffusers' dispatch_attention_fn, itself or by its processor, so its tokens would "
            "never meet"
        )
        raise ParallelConfigError(msg)
    return applied


def _attention_of(
    name: str,
    module: nn.Module,
    named: Mapping[str, SequenceParallelAttention],
    known: dict[type, bool],
) -> SequenceParallelAttention | None:
    """How a module attends over a split sequence; ``None`` if it does not."""
    plan = named.get(name)
    if plan is None:
        return SequenceParallelAttention() if _attends(module, known) else None
    if plan.kind == "softmax" and not _attends(module, known):
        msg = (
            f"the plan names the attention of module {name!r}, a {type(module).__name__}, which "
            "calls neither torch's scaled_dot_product_attention nor diffusers' "
            "dispatch_attention_fn, itself or by its processor"
        )
        raise ParallelConfigError(msg)
    return plan


def problems_with_model(plan: SequenceParallelModelPlan, model: nn.Module) -> list[str]:
    """Everything about a plan that a model does not have."""
    problems: list[str] = []
    planned: dict[str, PlannedModule] = {}
    for pattern, entry in plan.items():
        try:
            found = find_modules(model, pattern)
            if isinstance(entry, Mapping | tuple) or hasattr(entry, "gather_dim"):
                for name, module in found:
                    if name not in planned:
                        planned[name] = PlannedModule(name, module)
                    planned[name].add(entry)  # type: ignore[arg-type]
        except ParallelConfigError as error:
            problems.append(str(error))
    if not problems:
        try:
            apply_plan(plan, model)
        except ParallelConfigError as error:
            problems.append(str(error))
    return problems


def attention_owner(module: nn.Module) -> Any:
    """What makes the attention calls of a module: its processor, if it has one, or itself."""
    processor = getattr(module, "processor", None)
    return module if processor is None or not callable(processor) else processor


def _attends(module: nn.Module, known: dict[type, bool]) -> bool:
    owner = attention_owner(module)
    if type(owner) not in known:
        found: list[object] = []
        subclass_with(type(owner), _noting(found))
        known[type(owner)] = bool(found)
    return known[type(owner)]


def _noting(found: list[object]) -> Callable[[Any], Any]:
    def replace(value: Any) -> Any:
        if value is scaled_dot_product_attention or is_dispatch(value):
            found.append(value)
        return value

    return replace
