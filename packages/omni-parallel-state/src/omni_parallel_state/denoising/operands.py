"""The operands of an operation that waits for one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.waiting import (
    arrived,
    is_deferred,
    is_sequence,
    like_of,
    resolve,
    resolve_all,
    sequence_like,
)


class Operands:
    """The arguments of an operation that waits; what it then finds in them is what was there."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args, self._kwargs = _kept(args), _kept(kwargs)
        self._versions = [
            (tensor, tensor._version)
            for tensor in leaves((self._args, self._kwargs))
            if isinstance_tensor(tensor) and not tensor.is_inference()
        ]

    def call(self, function: Callable[..., Any]) -> Any:
        """The operation, of what has arrived.

        Raises:
            ParallelError: An operand was changed in place since.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                msg = (
                    f"a tensor of shape {tuple(tensor.shape)} was combined with a prediction that "
                    "had not arrived, and then changed in place; change a copy of it"
                )
                raise ParallelError(msg)
        return function(*resolve_all(self._args), **resolve_all(self._kwargs))

    def like(self, function: Callable[..., Any]) -> Any:
        """What the operation gives, without content; ``None`` if that cannot be told."""
        try:
            return function(*_without_content(self._args), **_without_content(self._kwargs))
        except Exception:  # it will be raised where the operation is made
            return None


def _without_content(value: Any) -> Any:
    if is_deferred(value) and not arrived(value):
        if (like := like_of(value)) is None:
            raise LookupError
        return like
    value = resolve(value)
    if isinstance(value, Tensor):
        return value.to("meta")
    if is_sequence(value):
        return sequence_like(value, map(_without_content, value))
    if type(value) is dict:
        return {key: _without_content(item) for key, item in value.items()}
    return value


def isinstance_tensor(value: object) -> bool:
    """Whether it is a real tensor; does not have a prediction arrive, as ``isinstance`` would."""
    return not is_deferred(value) and isinstance(value, Tensor)


def _kept(value: Any) -> Any:
    """Containers of their own, and copies of tensors of inference mode, which count no changes."""
    if is_deferred(value):
        if not arrived(value):
            return value
        value = resolve(value)
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if is_sequence(value):
        return sequence_like(value, map(_kept, value))
    if type(value) is dict:
        return {key: _kept(item) for key, item in value.items()}
    return value


def leaves(value: Any) -> Iterator[Any]:
    """What is within tuples, lists and dicts; none of it has to arrive for that."""
    if not is_deferred(value) and isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif not is_deferred(value) and isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value
