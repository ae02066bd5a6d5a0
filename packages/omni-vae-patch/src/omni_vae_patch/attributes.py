"""Attributes of one object, set for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Undo = Callable[[], None]


def put(target: Any, name: str, value: Any) -> Undo:
    """Set an attribute of one object, and nothing of its class.

    Returns:
        Gives the object back what it had; if somebody has set it anew since, that stays.
    """
    members = target.__dict__
    had, before = name in members, members.get(name)
    members[name] = value

    def undo() -> None:
        if members.get(name) is not value:
            return
        if had:
            members[name] = before
        else:
            del members[name]

    return undo


def plain_settings(target: Any) -> dict[str, bool | int | float | str]:
    """The numbers, texts and switches that an object has as attributes of its own."""
    return {
        key: value
        for key, value in vars(target).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str)
    }


@contextmanager
def attributes_kept(network: nn.Module) -> Iterator[None]:
    """Put back, at the end, what the modules of a network had beside weights.

    For a call that computes nothing: a module may remember tensors from it, which are no real ones.
    """
    before = [
        (module.__dict__, {key: (value, _contents(value)) for key, value in vars(module).items()})
        for module in network.modules()
    ]
    try:
        yield
    finally:
        for attributes, kept in before:
            for key in attributes.keys() - kept.keys():
                del attributes[key]
            for key, (value, contents) in kept.items():
                attributes[key] = value
                if contents is not None:
                    _refill(value, contents)


def _contents(value: object) -> list[Any] | None:
    if type(value) is dict:
        return list(value.items())
    return list(value) if type(value) is list else None


def _refill(value: Any, contents: list[Any]) -> None:
    now = _contents(value) or []
    if type(value) is dict:
        same = [(key, id(item)) for key, item in now] == [(key, id(i)) for key, i in contents]
    else:
        same = [*map(id, now)] == [*map(id, contents)]
    if not same:
        value.clear()
        (value.update if type(value) is dict else value.extend)(contents)
