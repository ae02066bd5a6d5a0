"""Communication that torch.compile does not trace by itself, as operators that it does.

Each operator takes the key of a group and finds the group at run time; its fake implementation
gives the shapes, which follow from its arguments alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.payload import resolved


def broadcast(group: CheckedGroup, tensor: Tensor, src: int) -> None:
    """Fill a contiguous tensor with that of group rank ``src``, in place."""
    if torch.compiler.is_compiling():
        _broadcast(tensor, group.key, src)
    else:
        group.broadcast(tensor, src)


@torch.library.custom_op("omni_group_coordinator::broadcast", mutates_args={"tensor"})
def _broadcast(tensor: Tensor, key: str, src: int) -> None:
    CheckedGroup.by_key(key).broadcast(tensor, src)


@_broadcast.register_fake
def _(tensor: Tensor, key: str, src: int) -> None:
    return None


def shift(group: CheckedGroup, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Send to the next rank of the ring; return what the previous one sent, of this shape."""
    if torch.compiler.is_compiling():
        out: Tensor = _shift(tensor, group.key, list(shape))
        return out
    return post_shift(group, tensor, shape)


def post_shift(group: CheckedGroup, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """As `shift`, outside a trace."""
    out = tensor.new_empty(shape)
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sends, receives = [(resolved(tensor).contiguous(), following)], [(out, previous)]
    for work in group.iexchange(sends, receives, "ring"):
        work.wait()
    return out


@torch.library.custom_op("omni_group_coordinator::shift", mutates_args=())
def _shift(tensor: Tensor, key: str, shape: Sequence[int]) -> Tensor:
    return post_shift(CheckedGroup.by_key(key), tensor, shape)


@_shift.register_fake
def _(tensor: Tensor, key: str, shape: Sequence[int]) -> Tensor:
    return tensor.new_empty(shape)
