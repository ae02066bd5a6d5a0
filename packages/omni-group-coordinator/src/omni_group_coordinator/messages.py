"""Messages of plain data and tensors between two ranks: a typed header, then the tensors.

The header is JSON in a frame of fixed size (see `wire`); it names dtype, shape and device type of
each tensor, so that the receiver can post buffers of exactly the right size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import wire
from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.checks import agree_on_refusals
from omni_group_coordinator.errors import ParallelError, RankMismatchError
from omni_group_coordinator.payload import resolved
from omni_group_coordinator.pending_work import PendingWork, wait_all

_TENSOR = "$tensor"
METADATA = "metadata"
_ANSWER_TAG = 1  # answers travel beside the stream of messages, which may cross them


@dataclass(frozen=True)
class TensorSpec:
    """What a receiver must know of a tensor before it can post a buffer."""

    shape: torch.Size
    dtype: torch.dtype
    device_type: str = "cpu"

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device.type)

    def empty(self, device: torch.device) -> Tensor:
        """A buffer; tensors of an accelerator land on the receiver's own device."""
        where = torch.device("cpu") if self.device_type == "cpu" else device
        return torch.empty(self.shape, dtype=self.dtype, device=where)

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {str(self.dtype).removeprefix('torch.')} {self.device_type}"


def isend_object(group: CheckedGroup, value: object, dst: int, tag: int = 0) -> list[PendingWork]:
    """Post plain data; the first message is the frame, the second what does not fit."""
    parts = wire.frame(wire.encode(value))
    return [group.isend(part, dst, METADATA, tag) for part in parts if part is not None]


def recv_object(group: CheckedGroup, src: int, tag: int = 0) -> Any:
    """Wait for plain data."""
    first = torch.empty(wire.FRAME_BYTES, dtype=torch.uint8)
    group.irecv(first, src, METADATA, tag).wait()
    data, rest = wire.unframe(first, group=group.name)
    if rest:
        second = torch.empty(rest, dtype=torch.uint8)
        group.irecv(second, src, METADATA, tag).wait()
        data += bytes(second.tolist())
    return wire.decode(data)


def announce(group: CheckedGroup, sent: str, dst: int) -> None:
    """In debug mode, before a tensor is sent: hear what the receiver waits for.

    Raises:
        RankMismatchError: It is something else; the receiver raises too.
    """
    wait_all(isend_object(group, sent, dst))
    _compare(group, sent, recv_object(group, dst, _ANSWER_TAG), (group.rank, dst))


def answer(group: CheckedGroup, awaited: str, src: int) -> None:
    """The receiver's part of `announce`.

    Raises:
        RankMismatchError: The sender has something else; it raises too.
    """
    sent = recv_object(group, src)
    wait_all(isend_object(group, awaited, src, _ANSWER_TAG))
    _compare(group, sent, awaited, (src, group.rank))


def _compare(group: CheckedGroup, sent: object, awaited: object, pair: tuple[int, int]) -> None:
    if sent != awaited:
        msg = (
            f"group {group.name!r}: group rank {pair[1]} waits for a tensor of {awaited}, group "
            f"rank {pair[0]} sends one of {sent}"
        )
        raise RankMismatchError(msg)


@agree_on_refusals
def broadcast_object(group: CheckedGroup, value: object, src: int) -> Any:
    """Give every rank the plain data of group rank ``src``.

    Raises:
        TypeError: On ``src``: it is not plain data.
        ParallelError: On the other ranks then, which do not wait for what will not come.
        ParallelConfigError: ``src`` is no group rank.
    """
    group.peer(src, "src")
    refusal: TypeError | None = None
    try:
        data = b'{"value":%b}' % wire.encode(value if group.rank == src else None)
    except TypeError as error:
        refusal = error
        data = wire.encode({"refusal": str(error)})
    first, second = wire.frame(data)
    group.agree("broadcast_object", first.shape, first.dtype, "src", src)
    group.broadcast(first, src)
    data, rest = wire.unframe(first, group=group.name)
    if rest:
        if second is None or group.rank != src:
            second = torch.empty(rest, dtype=torch.uint8)
        group.broadcast(second, src)
        data += bytes(second.tolist())
    if refusal is not None:
        raise refusal
    content = wire.decode(data)
    if "refusal" in content:
        msg = f"group rank {src} of group {group.name!r} could not send: {content['refusal']}"
        raise ParallelError(msg)
    return content["value"]


def pack(value: object) -> tuple[object, list[Tensor]]:
    """Take the tensors out of nested dicts, lists and tuples.

    Returns:
        The same structure as plain data, with a reference in place of each tensor, and the
        tensors. The references hold shape, dtype and device type.
    """
    tensors: list[Tensor] = []
    try:
        return _pack(value, tensors), tensors
    except RecursionError:
        raise TypeError(wire.ENDLESS) from None


def _pack(value: object, tensors: list[Tensor]) -> object:
    if isinstance(value, Tensor):
        tensors.append(value)
        spec = TensorSpec.of(value)
        return {_TENSOR: (len(tensors) - 1, spec.shape, spec.dtype, spec.device_type)}
    if type(value) is dict:
        return {wire.PACKED_DICT: {key: _pack(item, tensors) for key, item in value.items()}}
    if type(value) in (list, tuple):
        items: Iterable[object] = value  # type: ignore[assignment]
        return type(value)(_pack(item, tensors) for item in items)  # type: ignore[call-arg]
    return value


def specs_in(packed: Any) -> dict[int, TensorSpec]:
    """The specs of the tensors that a packed structure refers to, by index."""
    found: dict[int, TensorSpec] = {}
    if isinstance(packed, dict):
        if _TENSOR in packed:
            index, shape, dtype, device_type = packed[_TENSOR]
            return {index: TensorSpec(shape, dtype, device_type)}
        packed = list(packed[wire.PACKED_DICT].values())
    if isinstance(packed, (list, tuple)) and not isinstance(packed, torch.Size):
        for item in packed:
            found |= specs_in(item)
    return found


def unpack(packed: Any, tensors: Mapping[int, Tensor]) -> Any:
    """Put the tensors back in the places that refer to them."""
    if isinstance(packed, dict):
        if _TENSOR in packed:
            return tensors[packed[_TENSOR][0]]
        return {key: unpack(item, tensors) for key, item in packed[wire.PACKED_DICT].items()}
    if isinstance(packed, (list, tuple)) and not isinstance(packed, torch.Size):
        return type(packed)(unpack(item, tensors) for item in packed)
    return packed


def isend_tensors(
    group: CheckedGroup, tensors: Iterable[Tensor], dst: int, operation: str
) -> list[PendingWork]:
    """Post the tensors in order; empty ones do not travel."""
    return [
        group.isend(resolved(tensor).contiguous(), dst, operation)
        for tensor in tensors
        if tensor.numel()
    ]


def irecv_tensors(
    group: CheckedGroup,
    specs: Iterable[TensorSpec],
    src: int,
    device: torch.device,
    operation: str,
) -> tuple[list[Tensor], list[PendingWork]]:
    """Post a new buffer for each spec, in order."""
    tensors = [spec.empty(device) for spec in specs]
    works = [group.irecv(tensor, src, operation) for tensor in tensors if tensor.numel()]
    return tensors, works


class Channels:
    """Named streams of tensors of fixed shape: after the first use no metadata travels.

    The first message of a channel carries its specs; from then on both sides know them. A sender
    whose tensors change raises before it posts anything. A receiver whose first message differs
    from what it registered raises too, but the sender has posted its tensors then: the group must
    not be used any further.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[str, int], dict[str, TensorSpec]] = {}
        self._registered: dict[str, dict[str, TensorSpec]] = {}
        self._known: dict[tuple[str, int], dict[str, TensorSpec]] = {}

    def register(self, name: str, specs: Mapping[str, TensorSpec]) -> None:
        """Say beforehand what a channel will bring.

        Raises:
            RankMismatchError: The channel is in use with other specs.
        """
        specs = dict(specs)
        for (other, src), known in self._known.items():
            if other == name and known != specs:
                raise RankMismatchError(_drift(name, f"group rank {src} sends", known, specs))
        self._registered[name] = specs

    def clear(self) -> None:
        """Forget every channel; both sides must do it."""
        self._sent.clear()
        self._registered.clear()
        self._known.clear()

    def isend(
        self, group: CheckedGroup, name: str, tensors: Mapping[str, Tensor], dst: int
    ) -> list[PendingWork]:
        """Post the tensors of one message.

        Raises:
            RankMismatchError: They differ in name, shape, dtype or device from the first ones.
        """
        specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
        known = self._sent.get((name, dst))
        works: list[PendingWork] = []
        if known is None:
            header = {key: _plain(spec) for key, spec in specs.items()}
            works += isend_object(group, {"channel": name, "specs": header}, dst)
            self._sent[name, dst] = specs
        elif list(known.items()) != list(specs.items()):
            raise RankMismatchError(_drift(name, "this rank sends", known, specs))
        return works + isend_tensors(group, tensors.values(), dst, "send channel")

    def irecv(
        self,
        group: CheckedGroup,
        name: str,
        src: int,
        device: torch.device,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], list[PendingWork]]:
        """Post the buffers of one message: those given, else new ones.

        Raises:
            RankMismatchError: The first message is of another channel, or brings other tensors
                than were registered, or than the given buffers have room for.
        """
        specs = self._known.get((name, src))
        if specs is None:
            specs = self._known[name, src] = self._first(group, name, src)
        if buffers is None:
            tensors, works = irecv_tensors(group, specs.values(), src, device, "receive channel")
            return dict(zip(specs, tensors, strict=True)), works
        room = {key: TensorSpec.of(tensor) for key, tensor in buffers.items()}
        if room != specs:
            raise RankMismatchError(_drift(name, "the given buffers have", specs, room))
        works = [
            group.irecv(buffers[key], src, "receive channel")
            for key, spec in specs.items()
            if spec.shape.numel()
        ]
        return dict(buffers), works

    def _first(self, group: CheckedGroup, name: str, src: int) -> dict[str, TensorSpec]:
        header = recv_object(group, src)
        if not isinstance(header, dict) or header.get("channel") != name:
            msg = (
                f"group {group.name!r}: this rank receives channel {name!r}, but group rank {src} "
                f"sends {header!r}; both sides must use channels in the same order"
            )
            raise RankMismatchError(msg)
        specs = {key: TensorSpec(*spec) for key, spec in header["specs"].items()}
        expected = self._registered.get(name)
        if expected is not None and expected != specs:
            raise RankMismatchError(_drift(name, f"group rank {src} sends", expected, specs))
        return specs


def _plain(spec: TensorSpec) -> tuple[torch.Size, torch.dtype, str]:
    return spec.shape, spec.dtype, spec.device_type


def _drift(
    name: str, who: str, known: Mapping[str, TensorSpec], now: Mapping[str, TensorSpec]
) -> str:
    def lines(specs: Mapping[str, TensorSpec]) -> str:
        return ", ".join(f"{key}: {spec}" for key, spec in specs.items()) or "nothing"

    return (
        f"channel {name!r} was opened with {lines(known)}, but {who} {lines(now)}; a channel's "
        "tensors keep their names, shapes and dtypes: use another name for other tensors, or "
        "clear the channels on both sides"
    )
