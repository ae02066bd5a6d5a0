"""Counts of one decode: bytes that live at once, and bytes that are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from bench.vae_results import Sent
from omni_group_coordinator import Traffic as Recording
from omni_parallel.plan.live_bytes import LiveBytes as Live
from omni_parallel.plan.live_bytes import tensors_in


class LiveBytes(Live):  # type: ignore[no-untyped-call]
    """As of the umbrella's plans, of real tensors; it also counts what is sent, at the same place.

    Attributes:
        sent: Bytes for peers; of a reduction those of a ring algorithm.
        sends: Operators that send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.sends = 0

    @property
    def wire(self) -> Sent:
        """What was sent."""
        return Sent(self.sent, self.sends)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each operator."""
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if getattr(func, "namespace", "") == "c10d":
            self._send(str(getattr(func, "overloadpacket", func)), args)
        return output

    def tensors_in(self, tree: Any) -> list[Tensor]:
        """Not subclasses: what they hold is seen for itself."""
        return _tensors(tree)

    def _send(self, name: str, args: tuple[Any, ...]) -> None:
        if (size := sent_bytes(name, args)) is not None:
            self.sent += size
            self.sends += 1


def sent_bytes(name: str, args: Sequence[Any]) -> int | None:
    """What this rank sends in an operator of torch.distributed over all ranks, if it sends."""
    ranks, me = dist.get_world_size(), dist.get_rank()
    others = ranks - 1
    match name.removeprefix("c10d."):
        case "send":
            return _bytes(args[0])
        case "broadcast_":
            return others * _bytes(args[0]) if args[2] == me else 0
        case "allreduce_":
            return 2 * others * _bytes(args[0]) // ranks
        case "allgather_" | "_allgather_base_":
            return others * _bytes(args[1])
        case "alltoall_base_":
            whole, pieces = args[1], args[4]
            own = pieces[me] / max(1, sum(pieces)) if pieces else 1 / ranks
            return round(_bytes(whole) * (1 - own))
    return None


def _bytes(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(tree))


def _tensors(tree: Any) -> list[Tensor]:
    found = tensors_in(tree)
    return [t for t in found if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta"]


# -- what is sent, by purpose ------------------------------------------------------------------


class Purposes:
    """Tells what is sent within modules from what is sent elsewhere; a context manager.

    Args:
        recording: Of the whole call.
        modules: None of them is within another one of them.
    """

    def __init__(self, recording: Recording, modules: Iterable[nn.Module]) -> None:
        self._recording = recording
        self._modules = list(modules)
        self._stack = ExitStack()
        self._start = Sent(0, 0)
        self.inside = Sent(0, 0)

    def __enter__(self) -> Purposes:
        for module in self._modules:
            self._stack.callback(module.register_forward_pre_hook(self._enter).remove)
            self._stack.callback(module.register_forward_hook(self._leave).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self, *_: object) -> None:
        self._start = self.total()

    def _leave(self, *_: object) -> None:
        now = minus(self.total(), self._start)
        self.inside = Sent(self.inside.bytes + now.bytes, self.inside.calls + now.calls)

    def total(self) -> Sent:
        """Everything so far."""
        return Sent(self._recording.total_bytes, self._recording.total_calls)


def minus(left: Sent, *others: Sent) -> Sent:
    """What is left."""
    size, calls = sum(each.bytes for each in others), sum(each.calls for each in others)
    return Sent(left.bytes - size, left.calls - calls)
