"""Counts of one decode: bytes that live at once, bytes that are sent, and what halos must be."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.vae_results import Sent
from omni_group_coordinator import Traffic as Recording

Convolution = nn.Conv2d | nn.Conv3d


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that operators make within a ``with`` block, while they are alive.

    By storage, from the operator that made it until Python and torch let go of it. It is the same
    in every run and on every machine, which the memory of a process is not. Weights and other
    tensors from before do not count, nor does what an operator allocates for itself and frees.

    It also counts what is sent, at the same place: what `torch.distributed` is given.

    Attributes:
        peak: Most bytes at any time.
        sent: Bytes for peers; of a reduction those of a ring algorithm.
        sends: Operators that send.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.sent = 0
        self.sends = 0
        self._bytes = 0
        self._live: set[int] = set()

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
        given = {id_of(t) for t in _tensors((args, kwargs))}
        output = func(*args, **dict(kwargs or {}))
        for tensor in _tensors(output):
            if id_of(tensor) not in given | self._live:
                self._follow(tensor)
        if getattr(func, "namespace", "") == "c10d":
            self._send(str(getattr(func, "overloadpacket", func)), args)
        return output

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), id_of(tensor)
        self._live.add(key)
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._bytes -= size

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


def id_of(tensor: Tensor) -> int:
    """The storage of a tensor, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    # Not subclasses: what they hold is seen for itself.
    leaves = tree_leaves(tree)
    return [t for t in leaves if type(t) in (Tensor, nn.Parameter) and t.device.type != "meta"]


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


# -- what halos must be ------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolved:
    """One call of a convolution in a decode by one process.

    Attributes:
        kernel: Rows and columns that it reads at once.
        row_bytes: Of one row of its input, and of one column: other side × channels × batch ×
            frames × size of a number, with what the caller has padded or remembered.
    """

    kernel: tuple[int, int]
    row_bytes: tuple[int, int]

    @property
    def reaches(self) -> bool:
        """Whether it needs more than one row and one column."""
        return self.kernel != (1, 1)


@contextmanager
def convolutions_of(vae: nn.Module) -> Iterator[list[Convolved]]:
    """The calls of convolutions within the block, which are all of stride 1 in a decoder."""
    found: list[Convolved] = []
    with ExitStack() as stack:
        for module in vae.modules():
            if isinstance(module, Convolution):
                _record(module, found)
                stack.callback(module.__dict__.pop, "_conv_forward")
        yield found


def _record(module: Convolution, found: list[Convolved]) -> None:
    original: Callable[[Tensor, Tensor, Tensor | None], Tensor] = module._conv_forward
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found.append(
            Convolved((spans[-2], spans[-1]), (x.nbytes // x.shape[-2], x.nbytes // x.shape[-1]))
        )
        return original(x, weight, bias)

    # Not forward: causal convolutions pad and join frames in theirs.
    module.__dict__["_conv_forward"] = convolve


def halo_bytes(calls: Iterable[Convolved], dim: int, ranks: int) -> int:
    """What arithmetic says that the busiest rank sends: for each convolution and neighbour, rows.

    Args:
        calls: Of the whole decode.
        dim: The side that is split, from the end.
        ranks: How many; an inner one has two neighbours.
    """
    down = up = 0
    for call in calls:
        reach, size = call.kernel[dim] - 1, call.row_bytes[dim]
        down += reach // 2 * size
        up += (reach - reach // 2) * size
    return down + up if ranks > 2 else max(down, up)
