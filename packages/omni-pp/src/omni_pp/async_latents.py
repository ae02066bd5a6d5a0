"""`AsyncLatents`: what stands for the latents that another stage sends, until they are needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from omni_group_coordinator import ParallelError
from omni_parallel_state.denoising.deferred import Deferred
from omni_parallel_state.denoising.waiting import (
    Waiting,
    arrived,
    fill,
    is_deferred,
    is_sequence,
    perform,
    resolve,
    sequence_like,
)

LATENTS = "latents"
"""Where a dict of received tensors has the latents."""


class Handle(Protocol):
    """A message under way, such as a work of torch.distributed."""

    def wait(self) -> Any:
        """Return when it is here."""


class AsyncLatents(Deferred):
    """Behaves as latents that have not arrived.

    The first use that needs their content waits for them: every handle exactly once, also where
    one raises, then the calls of ``postproc`` in order. Slices, casts and arithmetic wait too, and
    give what stands for their result. Shape, dtype and device are known before, from the buffers
    that are to be filled; those are not read.

    ``isinstance(latents, torch.Tensor)`` is False by design: torch's C++ would take a yes for leave
    to read the object's memory as that of a tensor. `resolve` gives the real one.

    Args:
        tensor_dict: Has the buffer as ``"latents"``, or a tuple of buffers, once all handles have
            been waited for and all of ``postproc`` is done; a handle may put it there.
        handles: To wait for.
        postproc: Calls to make after that.
        device: Where the latents arrive, if no buffer tells.
    """

    __array_priority__ = Tensor.__array_priority__

    def __init__(
        self,
        tensor_dict: dict[str, Any],
        handles: Sequence[Handle],
        postproc: Sequence[Callable[[], Any]],
        *,
        device: torch.device | None = None,
    ) -> None:
        arrival = _Arrival(tensor_dict, handles, postproc, device)
        arrival.latents = ref(self)
        like = partial(_without_content, tensor_dict[LATENTS]) if LATENTS in tensor_dict else None
        super().__init__(arrival, arrival, like=like)

    def resolve(self) -> Any:
        """The real latents, which this waits for.

        Raises:
            Exception: What a handle raised, each time again.
        """
        return resolve(self)

    wait = resolve

    @property  # type: ignore[misc]  # which torch and isinstance only read
    def __class__(self) -> Any:
        """This class, which does not wait; see above why it is not that of a tensor."""
        return AsyncLatents


class _Arrival:
    """The one wait for latents, and the operations that are to be made after it."""

    def __init__(
        self,
        tensor_dict: dict[str, Any],
        handles: Sequence[Handle],
        postproc: Sequence[Callable[[], Any]],
        device: torch.device | None,
    ) -> None:
        self.latents: ref[AsyncLatents] | None = None
        self._tensors = tensor_dict
        self._handles = list(handles)
        self._postproc = list(postproc)
        self._device = device
        self._operations: list[ref[Waiting]] = []
        self._is_here = self._is_busy = False
        self._error: Exception | None = None

    @property
    def device(self) -> torch.device:
        """Where the latents arrive."""
        if self._device is None:
            found = self._tensors.get(LATENTS)
            first = found[0] if isinstance(found, tuple | list) else found
            return first.device if isinstance(first, Tensor) else torch.device("cpu")
        return self._device

    def remember(self, operation: Waiting) -> None:
        """Take note of an operation on the latents."""
        self._operations.append(ref(operation))

    def flush(self) -> None:
        """Wait for the latents, and make the operations on them."""
        if self._error is not None:
            raise self._error
        if not self._is_here:
            self._receive()
        latents = None if self.latents is None else self.latents()
        if latents is not None and not arrived(latents):
            fill(latents, self._tensors[LATENTS])
        if not self._is_busy:
            self._perform()

    def _receive(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            try:
                handle.wait()
            except Exception as error:
                self._error = self._error or error
        if self._error is None:
            try:
                for call in self._postproc:
                    call()
                if LATENTS not in self._tensors:
                    msg = f"no {LATENTS!r} among the received tensors: {sorted(self._tensors)}"
                    raise ParallelError(msg)
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        self._is_here = True

    def _perform(self) -> None:
        """Make all of the operations; one that fails is tried again when it is asked for again."""
        self._is_busy = True  # an operation on one that has failed asks for that one
        failed, error = [], None
        for weak in self._operations:
            operation = weak()
            try:
                if operation is not None and not arrived(operation):
                    perform(operation)
            except Exception as raised:
                failed.append(weak)
                error = error or raised
        self._operations, self._is_busy = failed, False
        if error is not None:
            raise error


def _without_content(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_without_content(item) for item in value)
    return value.to("meta") if isinstance(value, Tensor) else None


def resolved(value: Any) -> Any:
    """The value with real tensors for what has not arrived, also within outputs of a pipeline.

    Args:
        value: Anything; looked into are tuples, named ones too, lists, dicts and dataclasses.
    """
    if is_deferred(value):
        return resolve(value)
    if is_sequence(value):
        return sequence_like(value, map(resolved, value))
    if is_dataclass(value) and not isinstance(value, type):
        found = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        new = {key: resolved(item) for key, item in found.items() if _holds_deferred(item)}
        return _changed(value, new) if new else value
    if type(value) is dict:
        return {key: resolved(item) for key, item in value.items()}
    return value


def _changed(value: Any, new: dict[str, Any]) -> Any:
    if type(value).__dataclass_params__.frozen:
        return replace(value, **new)
    value = copy.copy(value)
    for name, item in new.items():
        setattr(value, name, item)
    return value


def _holds_deferred(value: Any) -> bool:
    if is_deferred(value):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds_deferred, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_deferred, value))
    return is_dataclass(value) and any(
        _holds_deferred(getattr(value, entry.name)) for entry in fields(value)
    )
