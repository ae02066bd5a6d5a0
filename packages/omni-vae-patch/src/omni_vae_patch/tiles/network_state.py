"""What a network keeps between its calls, besides what the calls are given.

A network that remembers something in its modules, as causal convolutions may their last frames,
cannot have each call computed on any rank: calls between which the memory is not cleared belong
together. A network does not say that it remembers; it is seen from what a call changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError

Place = tuple[str, str]
"""Name of a module within the network, and of its attribute."""

_NOT_MEMORY = frozenset(
    (
        *("_parameters", "_modules", "training", "forward", "_compiled_call_impl"),
        *("_forward_hooks", "_forward_pre_hooks", "_hf_hook", "_diffusers_hook"),
    )
)


class CallWatch:
    """Finds out whether the calls of a network change anything that the next call may read."""

    def __init__(self, network: nn.Module, owner: str) -> None:
        self._network = network
        self._owner = owner
        self.changed: set[Place] = set()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call and compare what was before and after.

        Raises:
            ParallelConfigError: It drew random numbers.
        """
        devices = {value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        before, random = _memory(self._network), _random_states(devices)
        try:
            result = self._network(*args, **kwargs)
        finally:
            after = _memory(self._network)
            differ = {key for key in before | after if before.get(key) != after.get(key)}
            self.changed |= differ
        if any(
            not torch.equal(*pair) for pair in zip(random, _random_states(devices), strict=True)
        ):
            msg = (
                f"the tiles of {self._owner} cannot be computed on several ranks: its network "
                "draws random numbers, so that each tile depends on those before it; turn the "
                "noise off, decode on one rank, or use the exact spatial mode"
            )
            raise ParallelConfigError(msg)
        return result


class MemoryMarks:
    """Tells whether the code between two calls has cleared the network's memory.

    Puts a mark in each place where the network is known to keep something. Where all marks are
    gone at the next call, the memory was cleared between them.
    """

    def __init__(self, network: nn.Module, places: set[Place]) -> None:
        self._mark = object()
        self._slots = [(network.get_submodule(name).__dict__, key) for name, key in sorted(places)]
        self._kept = [(slot, key, slot.get(key)) for slot, key in self._slots]

    def kept(self) -> bool:
        """Whether something of the last call is still there; marks the places anew."""
        found = any(slot.get(key) is self._mark for slot, key in self._slots)
        for slot, key in self._slots:
            slot[key] = self._mark
        return found

    def restore(self) -> None:
        """Put back what was there."""
        for slot, key, value in self._kept:
            slot[key] = value


def _memory(network: nn.Module) -> dict[Place, object]:
    return {
        (name, key): _identity(value)
        for name, module in network.named_modules()
        for key, value in module.__dict__.items()
        if key not in _NOT_MEMORY
    }


def _identity(value: object) -> object:
    """Changes when the value does; deep enough for lists and dicts of tensors."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, list | tuple):
        return id(value), tuple(map(_identity, value))
    if isinstance(value, dict):
        return id(value), tuple((key, _identity(item)) for key, item in value.items())
    if isinstance(value, bool | int | float | str):
        return value
    return id(value)


def _random_states(devices: set[torch.device]) -> list[Tensor]:
    states = [torch.get_rng_state()]
    for device in devices:
        if device.type != "cpu":
            states.append(torch.get_device_module(device).get_rng_state(device))
    return states
