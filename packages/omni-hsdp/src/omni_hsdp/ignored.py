"""Which parameters stay whole on every rank, and why."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.checkpoints.dtypes import PLAIN_DTYPES, is_kept, kept_in_float32

_FP8 = "float8", "float4"


@dataclass(frozen=True)
class WholeParameter:
    """A parameter that is not sharded.

    Attributes:
        name: Its dotted name.
        bytes: Its size, on every rank.
        reason: Why it is not.
    """

    name: str
    bytes: int
    reason: str


def ignored_modules(model: nn.Module, asked: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules of which nothing is sharded, by name.

    Args:
        model: The model.
        asked: Dotted names; default: those in its attribute ``_hsdp_ignored_modules``.

    Raises:
        ParallelConfigError: The model has no such module; names those that are close.
    """
    names = getattr(model, "_hsdp_ignored_modules", ()) if asked is None else asked
    modules = dict(model.named_modules())
    found = {}
    for name in [names] if isinstance(names, str) else names:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, modules, n=5)
            near = ", ".join(close or [child for child, _ in model.named_children()])
            msg = (
                f"{type(model).__name__} has no module {name!r} to leave whole; the nearest: {near}"
            )
            raise ParallelConfigError(msg)
        found[name] = modules[name]
    return found


def gather_dtype(model: nn.Module, param_dtype: torch.dtype | None) -> torch.dtype | None:
    """What weights are cast to when they are gathered, or None if they are not cast."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if param_dtype in dtypes or any(is_code(dtype) for dtype in dtypes):
        return None
    return param_dtype


def is_code(dtype: torch.dtype) -> bool:
    """Whether values of a dtype mean something together with a scale only: fp8 and fp4."""
    return str(dtype).removeprefix("torch.").startswith(_FP8)


def whole_parameters(
    model: nn.Module,
    blocks: Iterable[tuple[str, nn.Module]],
    ignored: dict[str, nn.Module],
    cast_to: torch.dtype | None,
) -> dict[nn.Parameter, WholeParameter]:
    """The parameters that stay whole.

    Args:
        model: The model, not yet sharded.
        blocks: What is gathered as one.
        ignored: Modules of which nothing is sharded, by name.
        cast_to: What weights are cast to when they are gathered.
    """
    asked = {p: name for name, module in ignored.items() for p in module.parameters()}
    kept = kept_in_float32(model, cast_to)
    owners = owners_of(model, [name for name, _ in blocks])
    found = {}
    for name, parameter in model.named_parameters():
        reason = _reason(parameter)
        if parameter in asked:
            reason = f"in the ignored module {asked[parameter]!r}"
        elif is_kept(name, kept):
            reason = f"kept in {parameter.dtype} while others are cast to {cast_to}"
        elif "" not in owners[parameter] and len(owners[parameter]) > 1:
            reason = f"shared by the blocks {', '.join(sorted(owners[parameter]))}"
        if reason:
            size = parameter.numel() * parameter.element_size()
            found[parameter] = WholeParameter(name, size, reason)
    return found


def owners_of(model: nn.Module, blocks: Iterable[str]) -> dict[nn.Parameter, set[str]]:
    """The blocks, by name, in which each parameter is; ``""`` is what is in none."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(modules[name]): name for name in blocks}
    names = {name: first[id(module)] for name, module in modules.items() if id(module) in first}
    owners: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        prefix = name.rpartition(".")[0]
        while prefix and prefix not in names:
            prefix = prefix.rpartition(".")[0]
        owners.setdefault(parameter, set()).add(names.get(prefix, ""))
    return owners


def _reason(parameter: nn.Parameter) -> str:
    dtype = str(parameter.dtype).removeprefix("torch.")
    reasons = {
        f"packed: a {type(parameter).__name__}": type(parameter) is not nn.Parameter,
        f"fp8: {dtype}": is_code(parameter.dtype),
        f"not floating-point: {dtype}": parameter.dtype not in PLAIN_DTYPES,
        "a scalar": parameter.ndim == 0,
        "empty": parameter.numel() == 0,
        "not contiguous in memory": not parameter.is_contiguous(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
