"""Plain data as bytes: the only form in which anything but tensors travels between ranks.

JSON with a few tags, and never pickle: what arrives can only be data. A message is one frame of
fixed size, so that the receiver knows what to post; what does not fit follows in a second
message of known length.
"""

from __future__ import annotations

import json
import struct
from typing import Any

import torch

from omni_group_coordinator.errors import CommunicationError, ParallelConfigError

FRAME_BYTES = 1024
"""Size of the first message. gloo ends the process when a message is larger than its buffer."""

_HEAD = struct.Struct(">4sQ")
_MAGIC = b"omn1"
FRAME_ROOM = FRAME_BYTES - _HEAD.size
"""Bytes of data that the first message itself can hold."""

ENDLESS = "the value contains itself, or nests too deeply, and does not travel between ranks"

PACKED_DICT = "$keys"
"""Key of a dict inside the packed form of a tensor dict."""

_TAGS = ("$tuple", "$size", "$dtype", "$device", "$dict")


def encode(value: object) -> bytes:
    """Plain data as bytes.

    Legal are ``None``, bool, int, float, str, lists, tuples and dicts of these, and
    `torch.dtype`, `torch.Size` and `torch.device`. They come back as they were.

    Raises:
        TypeError: The value holds anything else; the message says where.
    """
    try:
        return json.dumps(_to_json(value, "value"), separators=(",", ":")).encode()
    except RecursionError:
        raise TypeError(ENDLESS) from None


def decode(data: bytes) -> Any:
    """The value that `encode` made these bytes of."""
    return _from_json(json.loads(data.decode()))


def _to_json(value: object, where: str) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if type(value) in (list, tuple):
        items = [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]  # type: ignore[arg-type, var-annotated]
        return items if type(value) is list else {"$tuple": items}
    if type(value) is dict:
        return _dict_to_json(value, where)
    msg = (
        f"{where} is of type {type(value).__module__}.{type(value).__qualname__}, which does not "
        "travel between ranks; legal: None, bool, int, float, str, list, tuple, dict, "
        "torch.dtype, torch.Size, torch.device (tensors go through the tensor-dict methods)"
    )
    raise TypeError(msg)


def _dict_to_json(value: dict[Any, Any], where: str) -> dict[str, Any]:
    if all(type(key) is str and key not in _TAGS for key in value):
        # The packed form of a tensor dict puts each dict under this key, which no user has typed.
        return {
            key: _to_json(item, where if key == PACKED_DICT else f"{where}[{key!r}]")
            for key, item in value.items()
        }
    pairs = [
        [_to_json(key, f"key {key!r} of {where}"), _to_json(item, f"{where}[{key!r}]")]
        for key, item in value.items()
    ]
    return {"$dict": pairs}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        tag, content = next(iter(value.items()))
        if tag in _TAGS:
            return _from_tag(tag, content)
    return {key: _from_json(item) for key, item in value.items()}


def _from_tag(tag: str, content: Any) -> Any:
    match tag:
        case "$tuple":
            return tuple(_from_json(item) for item in content)
        case "$size":
            return torch.Size(content)
        case "$dtype":
            return _dtype(content)
        case "$device":
            return torch.device(content)
        case _:
            return {_from_json(key): _from_json(item) for key, item in content}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        msg = f"a peer sent the dtype {name!r}, which this version of torch does not have"
        raise ParallelConfigError(msg)
    return dtype


def frame(data: bytes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pack bytes into the first message, and the rest (or ``None``) into a second.

    Returns:
        uint8 tensors of shape ``(FRAME_BYTES,)`` and ``(rest,)`` on the CPU.
    """
    first = bytearray(FRAME_BYTES)
    _HEAD.pack_into(first, 0, _MAGIC, len(data))
    first[_HEAD.size : _HEAD.size + min(len(data), FRAME_ROOM)] = data[:FRAME_ROOM]
    rest = bytearray(data[FRAME_ROOM:])
    return (
        torch.frombuffer(first, dtype=torch.uint8),
        torch.frombuffer(rest, dtype=torch.uint8) if rest else None,
    )


def unframe(first: torch.Tensor, *, group: str) -> tuple[bytes, int]:
    """The bytes in the first message, and how many follow in the second.

    Raises:
        CommunicationError: The message is no header: the ranks are out of step.
    """
    data = bytes(first.tolist())
    magic, length = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        msg = (
            f"group {group!r}: expected a header and found something else: this rank receives "
            "messages in another order than its peer sends them"
        )
        raise CommunicationError(msg, group=group, ranks=(), operation="receive header")
    return data[_HEAD.size : _HEAD.size + min(length, FRAME_ROOM)], max(0, length - FRAME_ROOM)
