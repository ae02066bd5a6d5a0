"""Finding the modules that a plan names."""

from __future__ import annotations

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_sp.plan_entries import OPTIONAL


def find_modules(root: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """The modules that a name of a plan stands for, with their own dotted names.

    Args:
        root: The model.
        pattern: ``""``: the model; else dotted, with ``*`` for every module of a list or dict and
            negative indices counted from the end of a list. A part that ends in ``?`` may be
            missing.

    Raises:
        ParallelConfigError: There is none; the message lists what there is.
    """
    found = [("", root)]
    for part in pattern.split(".") if pattern else []:
        found = [
            pair for name, module in found for pair in _children(root, pattern, name, module, part)
        ]
    return found


def _children(
    root: nn.Module, pattern: str, name: str, module: nn.Module, part: str
) -> list[tuple[str, nn.Module]]:
    children = dict(module.named_children())
    prefix = f"{name}." if name else ""
    if part == "*":
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            msg = (
                f"the plan names {pattern!r}, but {name or type(root).__name__!r} is a "
                f"{type(module).__name__}; '*' stands for the modules of a list or dict"
            )
            raise ParallelConfigError(msg)
        return [(prefix + key, child) for key, child in children.items()]
    if part.startswith("-") and part[1:].isdigit() and int(part[1:]) <= len(children):
        part = list(children)[int(part)]
    if part.endswith(OPTIONAL):
        part = part.removesuffix(OPTIONAL)
        if part not in children:
            return []
    if part not in children:
        msg = (
            f"the plan names the module {pattern!r}, which {type(root).__name__} does not have; "
            f"{name or type(root).__name__} has: {', '.join(children) or 'none'}"
        )
        raise ParallelConfigError(msg)
    return [(prefix + part, children[part])]
