"""What has not arrived yet: its state, and how it arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from omni_group_coordinator import ParallelError


class Round(Protocol):
    """What knows when predictions arrive."""

    @property
    def device(self) -> torch.device:
        """Where predictions arrive."""

    def flush(self) -> None:
        """Have every prediction that is under way arrive."""

    def remember(self, operation: Waiting) -> None:
        """Take note of an operation on predictions that are under way, to be made by `flush`."""


class Waiting:
    """The value of a prediction, or of an operation on one, that has not arrived.

    Args:
        round_: That of the prediction.
        source: Which prediction it is of, or is made of.
        operation: Makes the value once that has arrived; ``None`` for a prediction itself.
        like: Gives the value without its content, for questions of shape and dtype; ``None`` where
            that is not known yet, and such questions have the prediction arrive.
    """

    __slots__ = (
        "__weakref__",
        "_omni_like",
        "_omni_operation",
        "_omni_round",
        "_omni_source",
        "_omni_value",
    )

    def __init__(
        self,
        round_: Round,
        source: object,
        operation: Callable[[], Any] | None = None,
        like: Callable[[], Any] | None = None,
    ) -> None:
        self._omni_round: Round | None = round_
        self._omni_source = source
        self._omni_operation = operation
        self._omni_like = like
        self._omni_value: Any = None
        if operation is not None:
            round_.remember(self)


def is_deferred(value: object) -> bool:
    """Whether a value is one of these, arrived or not."""
    return issubclass(type(value), Waiting)


def arrived(value: Waiting) -> bool:
    """Whether the value is there."""
    return value._omni_round is None


def source_of(value: Waiting) -> object:
    """Which prediction it is of, or is made of."""
    return value._omni_source


def like_of(value: Waiting) -> Any:
    """The value without content, on torch's device ``meta``; ``None`` if not known, or arrived."""
    return None if value._omni_like is None else value._omni_like()


def fill(value: Waiting, found: Any) -> None:
    """Have the value arrive."""
    value._omni_value = found
    value._omni_round = value._omni_operation = value._omni_source = value._omni_like = None


def perform(value: Waiting) -> None:
    """Do the operation that was waiting, now that its operands are there."""
    if value._omni_operation is not None:
        fill(value, value._omni_operation())


def resolve(value: Any) -> Any:
    """The value, for which predictions arrive if they must; anything else as it is."""
    if not is_deferred(value):
        return value
    if value._omni_round is not None:
        value._omni_round.flush()
    if value._omni_round is not None:
        msg = (
            "a prediction of an earlier call was never computed: the call that it belongs to was "
            "broken off"
        )
        raise ParallelError(msg)
    return value._omni_value


def is_sequence(value: object) -> bool:
    """Whether it is a list or a tuple, a named one too, and no other kind of these."""
    return type(value) in (tuple, list) or (
        issubclass(type(value), tuple) and hasattr(type(value), "_fields")
    )


def sequence_like(value: Any, items: Iterable[Any]) -> Any:
    """A list or tuple of the same kind; a named tuple is made of its items."""
    return type(value)(*items) if hasattr(type(value), "_fields") else type(value)(items)


def resolve_all(value: Any) -> Any:
    """As `resolve`, also for what is within tuples, lists and dicts."""
    return replaced_within(value, lambda one: resolve(one) if is_deferred(one) else one)


def replaced_within(value: Any, replace: Callable[[Any], Any]) -> Any:
    """A value, or what is within tuples, lists and dicts, with something in its place.

    Args:
        value: Kept as it is where nothing is replaced.
        replace: Gives what stands in place of a value; the value itself for those that stay.
    """
    found = replace(value)
    if found is not value:
        return found
    if is_sequence(value):
        items = [replaced_within(item, replace) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return sequence_like(value, items) if changed else value
    if type(value) is dict:
        found = {key: replaced_within(item, replace) for key, item in value.items()}
        return found if any(found[key] is not value[key] for key in value) else value
    return value
