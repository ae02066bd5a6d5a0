"""The outputs of a denoiser as what can travel: their tensors, and plain data about the rest."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import ParallelError

Plain = Any
"""``None``, numbers, texts, dtypes, lists, tuples and dicts of these."""

_TENSOR, _TUPLE, _LIST, _DICT, _OBJECT, _VALUE = "tensor", "tuple", "list", "dict", "object", "is"


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of an output, in order."""
    return list(_tensors(value))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))


def describe(value: object) -> Plain:
    """Everything about an output but the elements of its tensors.

    Raises:
        ParallelError: It holds something that does not travel.
    """
    if isinstance(value, Tensor):
        return [_TENSOR, list(value.shape), value.dtype]
    if value is None or type(value) in (bool, int, float, str):
        return [_VALUE, value]
    if is_dataclass(value) and not isinstance(value, type):
        members = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return [_OBJECT, _name(value), _items(members)]
    if type(value) in (tuple, list):
        kind = _TUPLE if type(value) is tuple else _LIST
        return [kind, [describe(item) for item in value]]  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return [_DICT, _name(value), _items(value)]
    msg = (
        f"the denoiser returned a {type(value).__qualname__}, which does not travel between ranks; "
        "legal: tensors, numbers, texts, and tuples, lists, dicts and dataclasses of these"
    )
    raise ParallelError(msg)


def _name(value: object) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _items(value: Mapping[Any, Any]) -> list[Any]:
    return [[key, describe(item)] for key, item in value.items()]


def rebuild(plain: Plain, tensors: Iterator[Tensor]) -> Any:
    """The output that a description is of, with these tensors in it."""
    kind, *rest = plain
    if kind == _TENSOR:
        return next(tensors)
    if kind == _VALUE:
        return rest[0]
    if kind in (_TUPLE, _LIST):
        items = [rebuild(item, tensors) for item in rest[0]]
        return tuple(items) if kind == _TUPLE else items
    found = {key: rebuild(item, tensors) for key, item in rest[1]}
    cls = _class(rest[0])
    return cls(**found) if kind == _OBJECT else cls(found)


def _class(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def tensor_specs(plain: Plain) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a description, in order."""
    kind, *rest = plain
    if kind == _TENSOR:
        return [(tuple(rest[0]), rest[1])]
    if kind == _VALUE:
        return []
    items = rest[0] if kind in (_TUPLE, _LIST) else [item for _, item in rest[1]]
    return [spec for item in items for spec in tensor_specs(item)]


def without_content(plain: Plain) -> Any:
    """The output that a description is of, with tensors that have a shape and no memory."""
    specs = tensor_specs(plain)
    return rebuild(plain, iter([torch.empty(s, dtype=d, device="meta") for s, d in specs]))
