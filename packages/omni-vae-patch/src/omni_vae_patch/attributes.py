"""Attributes of one object, set for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
