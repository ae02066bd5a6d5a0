"""Which modules of a model are blocks: gathered, and given up again, as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from omni_group_coordinator import ParallelConfigError

Condition = Callable[[str, nn.Module], bool]
"""Whether the module of this dotted name is a block."""

_DECLARED = ("_repeated_blocks", "_no_split_modules")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def find_blocks(
    model: nn.Module, conditions: Iterable[Condition | str] | str | None = None
) -> list[tuple[str, nn.Module]]:
    """The blocks of a model, with their names, in the order of ``named_modules``.

    Args:
        model: The model.
        conditions: Callables of name and module, or patterns of dotted names: ``*`` stands for
            one part or a piece of it (``"transformer_blocks.*"``), ``**`` for any number of
            parts. A module is a block if any of them holds. Default: the model's attribute
            ``_hsdp_shard_conditions``; without it, what repeats: the classes that diffusers and
            transformers declare as blocks, and the elements of lists of modules.

    Raises:
        ParallelConfigError: Nothing matches (names what would), or what matches cannot be called.
    """
    asked = getattr(model, "_hsdp_shard_conditions", None) if conditions is None else conditions
    if asked is None:
        found = _automatic(model)
    else:
        tests = _tests([asked] if isinstance(asked, str) or callable(asked) else list(asked))
        found = {
            name: module
            for name, module in model.named_modules()
            if name and any(test(name, module) for test in tests)
        }
    blocks = [(name, module) for name, module in found.items() if _has_parameters(module)]
    if not blocks:
        raise _nothing_matches(model, asked)
    for name, module in blocks:
        if _is_never_called(module):
            msg = (
                f"the block {name!r} is a {type(module).__name__}, which is never called; its "
                f"elements are: use {name + '.*'!r}"
            )
            raise ParallelConfigError(msg)
    return blocks


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name fits a pattern of `find_blocks`."""
    parts = {"**": ".*", "*": "[^.]*"}
    pieces = re.split(r"(\*\*|\*)", pattern)
    return re.fullmatch("".join(parts.get(p) or re.escape(p) for p in pieces), name) is not None


def _tests(asked: Sequence[object]) -> list[Condition]:
    tests: list[Condition] = []
    for condition in asked:
        if isinstance(condition, str):
            tests.append(_by_pattern(condition))
        elif callable(condition):
            tests.append(condition)
        else:
            msg = (
                f"{condition!r} is no shard condition; legal: a callable of name and module, or a "
                "pattern such as 'transformer_blocks.*'"
            )
            raise ParallelConfigError(msg)
    return tests


def _by_pattern(pattern: str) -> Condition:
    return lambda name, module: matches(pattern, name)


def _automatic(model: nn.Module) -> dict[str, nn.Module]:
    """What is declared as a block, and lists of modules in which nothing is."""
    modules = dict(model.named_modules())
    declared = {
        cls
        for module in modules.values()
        for attribute in _DECLARED
        for cls in getattr(module, attribute, None) or ()
    }
    found = {
        name
        for name, module in modules.items()
        if name and type(module).__name__ in declared and _repeats(name, module, modules)
    }
    for name, module in modules.items():
        inside = f"{name}."
        nested = any(other.startswith(inside) or _is_inside(name, other) for other in found)
        if not nested and _is_list_of_blocks(module):
            found |= {inside + child for child, _ in module.named_children()}
    return {name: module for name, module in modules.items() if name in found}


def _repeats(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether a module stands in a list, or is one of several of its class."""
    alike = sum(type(other) is type(module) for other in modules.values())
    return alike > 1 or name.rpartition(".")[2].isdigit()


def _is_inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _is_list_of_blocks(module: nn.Module) -> bool:
    """Whether a module is a list of modules that can be called, each made of other modules."""
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList)
        and bool(children)
        and all(any(True for _ in child.children()) for child in children)
        and all(_has_parameters(child) and not _is_never_called(child) for child in children)
    )


def _is_never_called(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and type(module).forward is nn.Module.forward


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _nothing_matches(model: nn.Module, asked: object) -> ParallelConfigError:
    lists = [
        f"{name}.*" if name else "*"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _has_parameters(module)
    ]
    children = [name for name, child in model.named_children() if _has_parameters(child)]
    what = "no module is a block" if asked is None else f"no module matches {asked!r}"
    would = ", ".join(lists[:20] or children[:20]) or "none: it has no parameters"
    msg = (
        f"{what} in {type(model).__name__}; patterns that would match something: {would}. Pass "
        "them as conditions=[...]"
    )
    return ParallelConfigError(msg)
