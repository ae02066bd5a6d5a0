"""Which lists of blocks are the trunk of a model, in order of execution."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition.families import REFUSED, USUAL_NAMES, VERIFIED
from omni_pp.partition.forward_source import Trunk, read_forward


@dataclass(frozen=True)
class BlockList:
    """A list of blocks of a model.

    Attributes:
        name: Dotted path in the model, such as ``"transformer_blocks"``.
        length: How many blocks it has.
    """

    name: str
    length: int


def find_block_lists(model: nn.Module, names: Sequence[str] = ()) -> tuple[BlockList, ...]:
    """The lists of blocks that make up a model's trunk, in order of execution.

    Classes of diffusers that were verified are in a table. Of any other class the source of
    ``forward`` is read: it must loop over its lists plainly, and hand on nothing from block to
    block but what the blocks return. It is refused by name where it

    - uses the position of a block, or zips its list with another one,
    - indexes, slices or measures a list of the trunk, or loops over it twice,
    - changes or keeps anything in the loop besides the output of the block,
    - reads after a later list what an earlier one gave.

    Blocks, and functions that are called beside them, are taken to give results and to change
    nothing. Helpers that ``forward`` calls are not read: a loop in one of them is not found. Where
    there is no source (a class typed into a shell), only lists that are named are accepted,
    unchecked.

    Args:
        model: A transformer, whole.
        names: Dotted paths of its lists in order of execution; default: found as described.

    Raises:
        ParallelConfigError: Nothing that can be cut was found, or ``names`` do not fit.
    """
    owner = _forward_owner(type(model))
    _refuse_families(model, owner)
    lists = _lists_of(model)
    if isinstance(names, str):
        msg = f"block_lists={names!r} is one name; legal: a sequence of them, such as ({names!r},)"
        raise ParallelConfigError(msg)
    asked = tuple(dict.fromkeys(names))
    if len(asked) != len(names):
        msg = f"block_lists={tuple(names)} names a list twice; each can be cut once"
        raise ParallelConfigError(msg)
    for name in asked:
        if name not in lists:
            msg = f"{type(model).__name__} has no list of blocks {name!r}; {_what_there_is(lists)}"
            raise ParallelConfigError(msg)
    verified = _is_of_diffusers(owner) and VERIFIED.get(owner.__name__)
    chosen = _verified(owner, verified, asked) if verified else _analysed(model, owner, asked)
    chosen = tuple(name for name in chosen if len(lists[name]))
    if not chosen:
        msg = f"the block lists of {type(model).__name__} are empty; {_what_there_is(lists)}"
        raise ParallelConfigError(msg)
    if len({id(lists[name]) for name in chosen}) != len(chosen):
        msg = f"{' and '.join(chosen)} of {type(model).__name__} are one list, which is used twice"
        raise ParallelConfigError(msg)
    _refuse_skips(model, chosen)
    return tuple(BlockList(name, len(lists[name])) for name in chosen)


def _verified(owner: type, known: tuple[str, ...], asked: tuple[str, ...]) -> tuple[str, ...]:
    if asked and asked != tuple(name for name in known if name in asked):
        msg = (
            f"block_lists={asked} are not lists of the trunk of {owner.__name__} in order of "
            f"execution, which are {', '.join(known)}"
        )
        raise ParallelConfigError(msg)
    return asked or known


def _analysed(model: nn.Module, owner: type, asked: tuple[str, ...]) -> tuple[str, ...]:
    lists = _lists_of(model)
    trunk = read_forward(owner)
    if trunk is None:
        if asked:
            return asked
        msg = (
            f"the source of {owner.__name__}.forward cannot be read, so that its trunk is not "
            f"known; name its lists in block_lists. {_what_there_is(lists)}"
        )
        raise ParallelConfigError(msg)
    chosen = _choose(model, trunk, asked)
    if reason := trunk.refusal(chosen):
        msg = f"{owner.__name__} cannot be cut into stages: {reason}. {_what_there_is(lists)}"
        raise ParallelConfigError(msg)
    left = [name for name in lists if name in USUAL_NAMES and name not in trunk.order]
    if left and not asked:
        msg = (
            f"{owner.__name__} cannot be cut into stages unasked: its forward loops over "
            f"{', '.join(chosen)}, but not plainly over {', '.join(left)}, which each stage would "
            "hold whole; name what to cut in block_lists if that is all right"
        )
        raise ParallelConfigError(msg)
    return chosen


def _choose(model: nn.Module, trunk: Trunk, asked: tuple[str, ...]) -> tuple[str, ...]:
    lists, looped = _lists_of(model), trunk.order
    if asked:
        if asked != tuple(name for name in looped if name in asked):
            msg = (
                f"block_lists={asked}: the forward of {type(model).__name__} does not loop over "
                f"these in this order, but over {', '.join(looped) or 'no list'}"
            )
            raise ParallelConfigError(msg)
        return asked
    usual = tuple(name for name in looped if name in USUAL_NAMES and name in lists)
    alike = tuple(name for name in looped if name in lists and _is_uniform(lists[name]))
    if usual or len(alike) == 1:
        return usual or alike
    found = f"several lists that may be it ({', '.join(alike)})" if alike else "none"
    msg = (
        f"no trunk of blocks found in {type(model).__name__}: looked in its forward for loops over "
        f"{', '.join(USUAL_NAMES)}, else over one list of blocks of one class, and found {found}; "
        f"{_what_there_is(lists)}. Name those to cut in block_lists, in order of execution"
    )
    raise ParallelConfigError(msg)


def _is_uniform(blocks: nn.ModuleList) -> bool:
    return len({type(block) for block in blocks}) == 1


def _lists_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """All lists, also one that has two names."""
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if isinstance(module, nn.ModuleList)}


def _what_there_is(lists: dict[str, nn.ModuleList]) -> str:
    top = [f"{name} ({len(blocks)})" for name, blocks in lists.items() if "." not in name]
    nested = [f"{name} ({len(blocks)})" for name, blocks in lists.items() if "." in name]
    more = f" and {len(nested) - 4} more" if len(nested) > 4 else ""
    return f"its lists: {', '.join(top + nested[:4]) or 'none'}{more}"


def _forward_owner(cls: type) -> type:
    """The class that defines ``forward``: FSDP and users subclass models without changing it."""
    return next(one for one in cls.__mro__ if "forward" in vars(one))


def _is_of_diffusers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"


def _refuse_families(model: nn.Module, owner: type) -> None:
    name = type(model).__name__
    reason = REFUSED.get(owner.__name__) if _is_of_diffusers(owner) else None
    if reason is None and hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
        reason = "it is a UNet: its up blocks take what its down blocks gave"
    if reason is None and hasattr(model, "_orig_mod"):
        reason = "it is compiled as a whole; compile its blocks instead (compile_repeated_blocks)"
    if reason is None and getattr(model, "_compiled_call_impl", None) is not None:
        reason = "it is compiled as a whole; compile its blocks instead (compile_repeated_blocks)"
    if reason:
        msg = f"{name} cannot be cut into stages: {reason}. One stage is all there can be"
        raise ParallelConfigError(msg)


def _refuse_skips(model: nn.Module, chosen: tuple[str, ...]) -> None:
    for name in chosen:
        for key, block in model.get_submodule(name).named_children():
            taken = [one for one in _parameters(block) if one.startswith("skip")]
            if taken:
                msg = (
                    f"{type(model).__name__} cannot be cut into stages: {name}.{key} takes "
                    f"{taken[0]!r}, so the model is U-shaped: late blocks take what early ones gave"
                )
                raise ParallelConfigError(msg)


def _parameters(block: Any) -> list[str]:
    inner = getattr(block, "_orig_mod", block)
    return list(inspect.signature(type(inner).forward).parameters)
