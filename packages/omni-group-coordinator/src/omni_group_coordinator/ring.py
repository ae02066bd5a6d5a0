"""Passing tensors round the ring of a group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from omni_group_coordinator import operators
from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.coordinator import GroupCoordinator, checked_group_of
from omni_group_coordinator.errors import ParallelConfigError, ParallelError
from omni_group_coordinator.payload import is_plain, resolved
from omni_group_coordinator.pending_work import PendingWork


def ring_shift(
    tensor: Tensor,
    group: GroupCoordinator | ProcessGroup | None = None,
    recv_shape: Sequence[int] | None = None,
) -> Tensor:
    """Send a tensor to the next rank and return what the previous rank sent.

    Traces under torch.compile, with a `GroupCoordinator` as the group.

    Args:
        tensor: What this rank sends; any layout in memory.
        group: The ranks; default: torch's default group.
        recv_shape: Shape that the previous rank sends; default: that of ``tensor``.
    """
    checked = checked_group_of(group)
    if checked is None:
        return tensor.clone()
    shape = tuple(tensor.shape if recv_shape is None else recv_shape)
    _agree(checked, [(tensor, shape)])
    return operators.shift(checked, tensor, shape)


class RingComm:
    """Sends to the next rank while receiving from the previous one, several tensors at once.

    Queue pairs with `send_recv`, start them with `commit`, compute, then `wait`: what
    `send_recv` returned may be read only after `wait`.

    Args:
        process_group: The ranks.

    Attributes:
        rank: This rank's group rank.
        world_size: Ranks of the group.
        send_rank: Global rank of the next rank.
        recv_rank: Global rank of the previous rank.
    """

    def __init__(self, process_group: GroupCoordinator | ProcessGroup | None) -> None:
        self._group = checked_group_of(process_group)
        ranks = (0,) if self._group is None else self._group.ranks
        self.rank = 0 if self._group is None else self._group.rank
        self.world_size = len(ranks)
        self.send_rank = ranks[(self.rank + 1) % self.world_size]
        self.recv_rank = ranks[(self.rank - 1) % self.world_size]
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._works: list[PendingWork] | None = None

    def send_recv(self, to_send: Tensor, recv_tensor: Tensor | None = None) -> Tensor:
        """Queue one pair.

        Args:
            to_send: Goes to the next rank; must not change before `wait`.
            recv_tensor: Is filled, whatever its layout in memory; default: a new tensor like
                ``to_send``.

        Returns:
            The tensor that is filled by the time `wait` returns.

        Raises:
            ParallelError: The ring is under way: `wait` has not been called.
            ParallelConfigError: The tensors differ in dtype: one ring moves tensors of one kind.
        """
        if self._works is not None:
            msg = "send_recv called between commit and wait; call wait first"
            raise ParallelError(msg)
        if recv_tensor is not None and recv_tensor.dtype != to_send.dtype:
            msg = (
                f"send_recv of a {to_send.dtype} tensor into a {recv_tensor.dtype} one; every rank "
                "passes on what it sends, so both must have one dtype"
            )
            error = ParallelConfigError(msg)
            if self._group is not None:
                self._group.agree_to_refuse("ring", error)
            raise error
        target = torch.empty_like(to_send) if recv_tensor is None else recv_tensor
        landing = target
        if not is_plain(target):
            landing = target.new_empty(target.shape)
            self._copies.append((target, landing))
        self._queue.append((resolved(to_send).contiguous(), landing))
        return target

    def commit(self) -> None:
        """Start every queued pair.

        Raises:
            ParallelError: It has been called already.
        """
        if self._works is not None:
            msg = "commit called twice; call wait before the next commit"
            raise ParallelError(msg)
        if self._group is None:
            for sent, landing in self._queue:
                landing.copy_(sent)
            self._works = []
            return
        _agree(self._group, [(sent, tuple(landing.shape)) for sent, landing in self._queue])
        following = (self.rank + 1) % self.world_size
        previous = (self.rank - 1) % self.world_size
        self._works = self._group.iexchange(
            [(sent, following) for sent, _ in self._queue],
            [(landing, previous) for _, landing in self._queue],
            "ring",
        )

    def wait(self) -> None:
        """Return once every tensor of this round has arrived.

        Raises:
            ParallelError: `commit` has not been called.
            CommunicationError: A neighbour died or the timeout passed.
        """
        if self._works is None:
            msg = "wait called before commit"
            raise ParallelError(msg)
        for work in self._works:
            work.wait()
        for target, landing in self._copies:
            target.copy_(landing)
        self._works, self._queue, self._copies = None, [], []


def _agree(group: CheckedGroup, pairs: Sequence[tuple[Tensor, tuple[int, ...]]]) -> None:
    if not group.debug or torch.compiler.is_compiling():
        return
    group.agree_on_text("ring", f"ring of {len(pairs)} tensors")
    # One text for all tensors: which of them differ is then seen side by side.
    sent = ", ".join(_described(tensor.shape, tensor.dtype) for tensor, _ in pairs)
    expected = ", ".join(_described(shape, tensor.dtype) for tensor, shape in pairs)
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    group.agree_on_exchange("ring", {following: sent}, {previous: expected})


def _described(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"({', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}"
