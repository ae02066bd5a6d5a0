"""A method of one autoencoder, replaced for a while."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import ref

from omni_vae_patch.attributes import put


class ReplacedMethod:
    """Stands in the place of ``decode`` or ``encode`` of one autoencoder.

    It has the signature of the original, which pipelines look at. Whoever has kept it calls the
    original once it is removed, and a copy of the autoencoder calls its own class's method.

    Args:
        vae: The autoencoder.
        name: Of the method.
        method: Called in its place.
    """

    def __init__(self, vae: Any, name: str, method: Callable[..., Any]) -> None:
        self._original: Callable[..., Any] = getattr(vae, name)
        self._method: Callable[..., Any] | None = method
        self._name = name
        self._first = next(iter(inspect.signature(self._original).parameters), "")
        self._vae = ref(vae)
        functools.update_wrapper(self, self._original, updated=())
        self._undo = put(vae, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own method, by whose names arguments may be given."""
        if not args and self._first in kwargs:
            args = (kwargs.pop(self._first),)
        return (self._original if self._method is None else self._method)(*args, **kwargs)

    def remove(self) -> None:
        """Give the autoencoder its own method back; a wrapper around this one stays."""
        self._method = None
        self._undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copy, which is whole on every rank."""
        twin = memo.get(id(self._vae()))
        return self if twin is None else getattr(type(twin), self._name).__get__(twin)
