"""The calls that an autoencoder's own tiling code makes to its network.

The code runs three times with something else in the network's place: to see which calls it makes
(`Recorder`), to make this rank's share of them (`Worker`), and to join the results of all ranks
(`Player`). Slicing, caches and their resets, blending: all of that stays the autoencoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_vae_patch.tiles.network_state import MemoryMarks
from omni_vae_patch.tiles.pending import Pending, has_pendings


@dataclass(frozen=True)
class Call:
    """One call of the network."""

    unit: int
    """Calls of one unit share state: they are made in order, on one rank."""
    inputs: str
    """Shapes and dtypes of what it is given."""
    work: int
    """Elements of its first tensor."""
    shape: tuple[int, ...]
    """Of the stand-in for its result."""


class Recorder:
    """Answers calls with stand-ins and keeps what they were.

    Args:
        owner: Class of the autoencoder, for messages.
        returned: How many things the network returns; 0 for a tensor that is not in a tuple.
        marks: Where the network keeps state of its own.
        shape_of: Gives the shape of the stand-in for a call's result.
    """

    def __init__(
        self,
        owner: str,
        returned: int,
        marks: MemoryMarks,
        shape_of: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], tuple[int, ...]],
    ) -> None:
        self._owner = owner
        self._returned = returned
        self._marks = marks
        self._shape_of = shape_of
        self._units: list[int] = []
        self._calls: list[tuple[str, int, tuple[int, ...]]] = []
        self._seen: dict[int, tuple[object, int]] = {}

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stand-in for a call's result."""
        index = len(self._calls)
        linked = {self._units[call] for call in self._links(index, (args, kwargs))}
        if self._marks.kept():
            linked.add(self._units[-1])
        unit = min(linked, default=index)
        self._units = [unit if other in linked else other for other in self._units] + [unit]
        first = first_tensor(args, kwargs, self._owner)
        shape = self._shape_of(first, args, kwargs)
        self._calls.append((describe_inputs(args, kwargs), first.numel(), shape))
        results = [Pending(first, index, shape) for _ in range(max(1, self._returned))]
        return tuple(results) if self._returned else results[0]

    def calls(self) -> tuple[Call, ...]:
        """What was called; units are counted from 0."""
        names = {unit: index for index, unit in enumerate(dict.fromkeys(self._units))}
        pairs = zip(self._units, self._calls, strict=True)
        return tuple(Call(names[unit], *call) for unit, call in pairs)

    def _links(self, index: int, value: object) -> Iterator[int]:
        """Earlier calls that this one shares something with: their results, or an object."""
        if isinstance(value, Pending):
            if value.origin is None:
                msg = (
                    f"the tiles of {self._owner} cannot be computed on several ranks: its code "
                    "makes one tile from the result of another; decode on one rank, or use the "
                    "exact spatial mode"
                )
                raise ParallelConfigError(msg)
            yield value.origin
            return
        if _is_plain(value):
            return
        items = value.values() if isinstance(value, dict) else value
        if isinstance(items, list | tuple | type({}.values())):
            for item in items:
                yield from self._links(index, item)
        # Tuples do not change, and those of the arguments are made anew for each call.
        if not isinstance(value, tuple):
            _, earlier = self._seen.setdefault(id(value), (value, index))
            if earlier != index:
                yield earlier


class Worker:
    """Makes this rank's calls when their turn comes, and answers all with stand-ins.

    What a network returns beside its result goes to the autoencoder's code as it is: it is the
    state that the next call of the unit gets.
    """

    def __init__(
        self,
        owner: str,
        make: Callable[[tuple[Any, ...], dict[str, Any]], Any],
        calls: tuple[Call, ...],
        returned: int,
        mine: frozenset[int],
    ) -> None:
        self._owner = owner
        self._make = make
        self._calls = calls
        self._returned = returned
        self._mine = mine
        self._count = 0
        self.results: dict[int, Tensor] = {}

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call if it is this rank's."""
        index, self._count = self._count, self._count + 1
        call = checked_call(self._calls, index, args, kwargs, self._owner)
        first = Pending(first_tensor(args, kwargs, self._owner), index, call.shape)
        if call.unit not in self._mine:
            return (first,) * self._returned if self._returned else first
        args, kwargs = self._real((args, kwargs))
        result, *rest = self._taken_apart(self._make(args, kwargs))
        self.results[index] = result
        return (first, *rest) if self._returned else first

    def _real(self, value: Any) -> Any:
        """With results in the place of their stand-ins; lists and dicts stay the same objects."""
        if isinstance(value, Pending) and value.origin is not None:
            return self.results[value.origin]
        if isinstance(value, tuple) and has_pendings(value):
            return tuple(self._real(item) for item in value)
        if isinstance(value, dict) and has_pendings(value):
            return {key: self._real(item) for key, item in value.items()}
        return value

    def _taken_apart(self, output: Any) -> tuple[Any, ...]:
        parts = tuple(output) if isinstance(output, tuple | list) else (output,)
        fits = isinstance(output, tuple | list) == bool(self._returned)
        if not fits or len(parts) != max(1, self._returned) or not isinstance(parts[0], Tensor):
            want = (
                f"a tuple of {self._returned}, its tensor first" if self._returned else "a tensor"
            )
            msg = (
                f"the tiles of {self._owner} cannot be computed on several ranks: its code takes "
                f"what the network returns as {want}, and it returned a "
                f"{type(output).__qualname__} of {len(parts)}"
            )
            raise ParallelConfigError(msg)
        return parts


class Player:
    """Answers calls with the results of all ranks."""

    def __init__(
        self, owner: str, calls: tuple[Call, ...], returned: int, results: Mapping[int, Tensor]
    ) -> None:
        self._owner = owner
        self._calls = calls
        self._returned = returned
        self._results = results
        self._ids = {id(result) for result in results.values()}
        self._count = 0

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the next call."""
        index, self._count = self._count, self._count + 1
        # A result that is given back to the network was a stand-in when the call was recorded.
        shown = tuple(None if self._is_result(value) else value for value in args)
        named = {key: None if self._is_result(value) else value for key, value in kwargs.items()}
        checked_call(self._calls, index, shown, named, self._owner)
        result = self._results[index]
        if not self._returned:
            return result
        rest = (Pending(first_tensor(args, kwargs, self._owner), index),) * (self._returned - 1)
        return (result, *rest)

    def _is_result(self, value: object) -> bool:
        return id(value) in self._ids

    def check_output(self, output: Any) -> None:
        """Raise if calls were left over, or something of the output was never computed.

        Raises:
            ParallelError: The autoencoder's code depends on what its network returns.
        """
        held = vars(output) if hasattr(output, "__dict__") else {}
        deep = [vars(item) for item in held.values() if hasattr(item, "__dict__")]
        if self._count != len(self._calls) or has_pendings((output, held, deep)):
            raise defeated(self._owner)


def defeated(owner: str) -> ParallelError:
    """The error for code that does something else once it has real results."""
    return ParallelError(
        f"the tiles of {owner} cannot be computed on several ranks: which calls its code makes "
        "depends on what they return; decode on one rank, or use the exact spatial mode"
    )


def checked_call(
    calls: tuple[Call, ...],
    index: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: str,
) -> Call:
    """The recorded call, which must be the one that is made now."""
    if index >= len(calls) or calls[index].inputs != describe_inputs(args, kwargs):
        raise defeated(owner)
    return calls[index]


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], owner: str) -> Tensor:
    """The tensor that a call is about."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    msg = f"{owner} calls its network without a tensor; its tiles cannot be told apart"
    raise ParallelConfigError(msg)


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Shapes, dtypes and plain values; what holds state is left out, it changes as it is used."""
    items = [("", value) for value in args] + sorted(kwargs.items())
    return " ".join(f"{name}{_word(value)}" for name, value in items)


def _word(value: object) -> str:
    if isinstance(value, Tensor) and not isinstance(value, Pending):
        shape = "x".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    return repr(value) if isinstance(value, bool | int | float | str) else "-"


def _is_plain(value: object) -> bool:
    plain = Tensor | bool | int | float | str | torch.dtype | torch.device | torch.Size
    return value is None or isinstance(value, plain)
