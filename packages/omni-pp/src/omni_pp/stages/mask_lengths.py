"""How long masks say that texts are: some models cut texts there, so shapes depend on it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any
from weakref import ref

from torch import Tensor

_REMEMBERED = 64


class MaskLengths:
    """Counts what masks let through, once for each mask.

    A pipeline makes its masks before its steps and passes the same tensors in each: so the host
    waits for the device in the first step of a request alone.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[Tensor], int, Hashable]] = {}

    def of(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Iterable[str]
    ) -> Hashable:
        """What a call's masks let through: for each of them, a number for each of its rows.

        Args:
            args: Positional arguments of the call.
            kwargs: Named ones.
            names: Of the positional parameters.
        """
        named = [*zip(names, args, strict=False), *sorted(kwargs.items())]
        return tuple(
            (name, self._count(value))
            for name, value in named
            if "mask" in name and isinstance(value, Tensor) and value.ndim
        )

    def _count(self, mask: Tensor) -> Hashable:
        weak, version, counts = self._known.get(id(mask), (None, 0, None))
        now = 0 if mask.is_inference() else mask._version  # those of inference mode count none
        if weak is not None and weak() is mask and version == now:
            return counts
        counts = tuple((mask != 0).reshape(mask.shape[0], -1).sum(-1).tolist())
        if len(self._known) >= _REMEMBERED:
            self._known = {key: kept for key, kept in self._known.items() if kept[0]() is not None}
        self._known[id(mask)] = ref(mask), now, counts
        return counts
