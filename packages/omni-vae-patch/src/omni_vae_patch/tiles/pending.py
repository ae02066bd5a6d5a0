"""A tensor that stands for what a network has not computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_NOMINAL = frozenset(
    (
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "__len__"),
        *("is_contiguous", "get_device", "is_floating_point", "is_complex"),
    )
)
"""Answered with the nominal shape."""

_TENSORS = frozenset(("data", "T", "mT", "H", "mH", "real", "imag", "grad"))
"""Attributes that are tensors."""

_VALUES = frozenset(
    (
        *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__"),
        *("item", "tolist", "numpy", "equal", "allclose"),
    )
)


class LookedAtError(Exception):
    """The values of a tensor that was not computed were asked for."""


class UnpackedError(Exception):
    """The result of a call was unpacked: the network returns several things, not one tensor."""


class Pending(Tensor):
    """Swallows whatever is done with it: nothing is computed, no memory is used.

    Enough for an autoencoder's tiling code, which cuts, blends and joins the tiles but does not
    look at them. Everything that is made of it has its shape, so nothing may depend on lengths.

    Args:
        like: Of the same dtype and device; and shape, unless there is another.
        origin: As the attribute.
        shape: Of the tensor.

    Attributes:
        origin: Index of the call whose result this is; ``None`` once something was done with it.
    """

    origin: int | None

    @staticmethod
    def __new__(
        cls, like: Tensor, origin: int | None = None, shape: Sequence[int] | None = None
    ) -> Pending:
        """A stand-in for a tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = shape or like.shape, like.dtype, like.device
        self: Pending = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.origin = origin
        return self

    def __iter__(self) -> Iterator[Tensor]:
        if self.origin is not None:
            raise UnpackedError
        return iter([Pending(self)] * len(self))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pending(origin={self.origin})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer without doing anything."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            nominal = name not in _TENSORS
        else:
            nominal = name in _NOMINAL
        if nominal:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in _VALUES:
            raise LookedAtError(name)
        derived = Pending(_first((args, kwargs)))
        if name in ("chunk", "split", "unbind", "tensor_split"):
            return _parts(name, derived, args, kwargs or {})
        return derived

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Never reached but by code that is not Python's, and needs data."""
        raise LookedAtError(str(func))


def _first(value: Any) -> Pending:
    return next(pendings_in(value))


def pendings_in(value: object) -> Iterator[Pending]:
    """The stand-ins in nested tuples, lists, sets and dicts."""
    if isinstance(value, Pending):
        yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from pendings_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from pendings_in(item)


def has_pendings(value: object) -> bool:
    """Whether there is a stand-in in it."""
    return next(pendings_in(value), None) is not None


def _parts(
    name: str, derived: Pending, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    given = [*args[1:], *kwargs.values()]
    if name == "unbind":
        return (derived,) * derived.shape[given[0] if given else 0]
    sizes, dim = given[0], given[1] if len(given) > 1 else 0
    if not isinstance(sizes, int):
        return (derived,) * (len(sizes) + (name == "tensor_split"))
    return (derived,) * (-(-derived.shape[dim] // sizes) if name == "split" else sizes)
