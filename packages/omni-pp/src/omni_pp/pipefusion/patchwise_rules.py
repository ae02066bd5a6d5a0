"""Which operations give the same on the flat form of a tensor, patch by patch, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni_pp.pipefusion.patch_values import Whole
from omni_pp.pipefusion.token_layout import TokenLayout

# Of operations that treat each element alone; torch marks the others of them.
_COPIES = frozenset(("_to_copy", "clone", "detach", "alias", "lift_fresh", "view_as_real_copy"))
_PLACEMENT = ("memory_format", "layout", "pin_memory")  # of the result of one, and no value
_JOINS = frozenset(("cat", "stack"))
_SPLITS = frozenset(("split", "split_with_sizes", "unbind", "chunk"))
_REDUCTIONS = frozenset(
    ("sum", "mean", "linalg_vector_norm", "amax", "amin", "var", "std", "norm", "prod")
)
FACTORIES = frozenset(
    f"{kind}_{how}"
    for how in ("like", "zeros", "ones", "empty", "full")
    for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "new")
)
"""Operations that make a tensor of the shape of another one."""


class Pending(NamedTuple):
    """An operand that has not arrived."""

    values: Any
    """Its `Values`."""
    shape: torch.Size


class Rule(NamedTuple):
    """How a result is made in the flat form: the arguments, and where its tokens lie."""

    layout: TokenLayout
    args: Mapping[str, Any]


def rule_for(
    func: Any, bound: Mapping[str, Any], operands: Sequence[Pending], ndim: int
) -> Rule | None:
    """How an operation is done in the flat form; ``None``: it is not.

    Args:
        func: An operator of torch.
        bound: Its arguments by name, with `Pending` for what has not arrived.
        operands: Those of them.
        ndim: Dimensions of its result, or of each of them.
    """
    layout: TokenLayout = operands[0].values.layout
    if any(one.values.layout != layout for one in operands):
        return None
    name = func._schema.name.removeprefix("aten::")
    if name in _COPIES or torch.Tag.pointwise in func.tags:
        return _pointwise(bound, layout, ndim)
    shape = operands[0].shape
    if name in _JOINS:
        return _joined(name, bound, layout, shape)
    maker = _DIMENSION_RULES.get(name)
    if name in _SPLITS:
        maker = _split
    elif name in _REDUCTIONS:
        maker = _reduced
    return None if maker is None else maker(dict(bound), layout, shape)


def _pointwise(bound: Mapping[str, Any], layout: TokenLayout, ndim: int) -> Rule | None:
    args: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, Pending):
            if len(value.shape) != ndim:
                return None
            args[name] = value.values
        elif isinstance(value, Tensor):
            if (operand := _operand(value, layout, ndim)) is None:
                return None
            args[name] = operand
        elif isinstance(value, list | tuple):
            return None
        elif name not in _PLACEMENT:
            args[name] = value
    return Rule(layout, args)


def _operand(tensor: Tensor, layout: TokenLayout, ndim: int) -> Whole | None:
    """A tensor that is there, as it is now: nobody may change it before it is needed."""
    if not tensor.ndim:
        return Whole(tensor.clone(), None)
    if tensor.ndim > ndim:
        return None
    tensor = tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))
    own = tuple(tensor.shape[dim] for dim in layout.dims)
    if all(length == 1 for length in own):
        dropped = [n for dim, n in enumerate(tensor.shape) if dim not in layout.dims[1:]]
        return Whole(tensor.reshape(dropped).clone(), None)
    lengths = list(tensor.shape)
    for dim, length in zip(layout.dims, layout.lengths, strict=True):
        if lengths[dim] not in (1, length):
            return None
        lengths[dim] = length
    return Whole(layout.flat(tensor.expand(lengths)).clone(), layout)


def _joined(
    name: str, bound: Mapping[str, Any], layout: TokenLayout, shape: torch.Size
) -> Rule | None:
    parts: list[Any] = []
    for item in bound["tensors"]:
        value: Any = item
        if len(value.shape) != len(shape) or (name == "stack" and value.shape != shape):
            return None
        if not isinstance(value, Pending):
            if tuple(value.shape[dim] for dim in layout.dims) != layout.lengths:
                return None
            value = Whole(layout.flat(value).clone(), layout)
        parts.append(value.values if isinstance(value, Pending) else value)
    dim = bound.get("dim", 0)
    if name == "stack":
        return _with_new_dim({"tensors": parts}, layout, dim % (len(shape) + 1))
    flat = layout.flat_dim(dim % len(shape))
    return None if flat is None else Rule(layout, {"tensors": parts, "dim": flat})


def _with_new_dim(args: dict[str, Any], layout: TokenLayout, dim: int) -> Rule:
    moved = layout.moved(tuple(one + (one >= dim) for one in layout.dims))
    return Rule(moved, args | {"dim": moved.flat_dim(dim)})


def _without(layout: TokenLayout, dims: Sequence[int]) -> TokenLayout:
    return layout.moved(tuple(one - sum(dim < one for dim in dims) for one in layout.dims))


_Maker = Callable[[dict[str, Any], TokenLayout, torch.Size], Rule | None]


def _split(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    dim = args.get("dim", 0) % len(shape)
    if (flat := layout.flat_dim(dim)) is None:
        return None
    unbinds = not {"split_size", "split_sizes", "chunks"} & args.keys()
    found = _without(layout, [dim]) if unbinds else layout
    return Rule(found, args | {"self": args["self"].values, "dim": flat})


def _reduced(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    given = args.get("dim")
    if given is None or given == []:
        return None
    dims = [dim % len(shape) for dim in (given if isinstance(given, list | tuple) else [given])]
    flats = [layout.flat_dim(dim) for dim in dims]
    if any(flat is None for flat in flats):
        return None
    found = layout if args.get("keepdim", False) else _without(layout, dims)
    changed = {"dim": flats if isinstance(given, list | tuple) else flats[0]}
    return Rule(found, args | {"self": args["self"].values} | changed)


def _select(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    dim = args["dim"] % len(shape)
    if (flat := layout.flat_dim(dim)) is None:
        return None
    return Rule(_without(layout, [dim]), args | {"self": args["self"].values, "dim": flat})


def _slice(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    flat = layout.flat_dim(args.get("dim", 0) % len(shape))
    if flat is None:
        return None
    return Rule(layout, args | {"self": args["self"].values, "dim": flat})


def _unsqueeze(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    return _with_new_dim({"self": args["self"].values}, layout, args["dim"] % (len(shape) + 1))


def _squeeze(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    given = args.get("dim")
    if given is None:
        return None
    dims = [dim % len(shape) for dim in (given if isinstance(given, list | tuple) else [given])]
    if any(dim in layout.dims for dim in dims):
        return None
    flats = [layout.flat_dim(dim) for dim in dims]
    changed = {"dim": flats if isinstance(given, list | tuple) else flats[0]}
    gone = [dim for dim in dims if shape[dim] == 1]
    return Rule(_without(layout, gone), {"self": args["self"].values} | changed)


def _expand(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    size = list(args["size"])
    if len(size) != len(shape):
        return None
    return _resized(args, layout, size, "size", {-1, *layout.lengths}, -1)


def _repeat(args: dict[str, Any], layout: TokenLayout, shape: torch.Size) -> Rule | None:
    repeats = list(args["repeats"])
    if len(repeats) != len(shape):
        return None
    return _resized(args, layout, repeats, "repeats", {1}, 1)


def _resized(
    args: dict[str, Any],
    layout: TokenLayout,
    given: list[int],
    name: str,
    legal: set[int],
    kept: int,
) -> Rule | None:
    """With a number for each dimension, that says of those of tokens that they stay."""
    if any(given[dim] not in legal for dim in layout.dims):
        return None
    flat = [n for dim, n in enumerate(given) if dim not in layout.dims]
    flat.insert(layout.axis, kept)
    return Rule(layout, {"self": args["self"].values, name: flat})


_DIMENSION_RULES: dict[str, _Maker] = {
    "select": _select,
    "slice": _slice,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
}
