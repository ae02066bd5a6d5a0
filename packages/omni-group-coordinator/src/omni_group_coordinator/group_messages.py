"""Point-to-point messages of a group: tensors, plain data, dicts of tensors, channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

from omni_group_coordinator import messages, wire
from omni_group_coordinator.checked_group import CheckedGroup
from omni_group_coordinator.errors import ParallelConfigError
from omni_group_coordinator.membership import GroupMembership
from omni_group_coordinator.messages import Channels, TensorSpec
from omni_group_coordinator.payload import resolved
from omni_group_coordinator.pending_work import PendingWork, wait_all
from omni_group_coordinator.process_groups import ProcessGroups

TensorDict = dict[str, Any]
"""Tensors and plain data by name; dicts, lists and tuples may nest."""


class GroupMessages(GroupMembership):
    """A group whose ranks send to each other.

    Messages between two ranks arrive in the order in which they were sent: receive in that
    order. Default peers are the neighbours: the next rank to send to, the previous to receive
    from. What is no tensor travels as typed plain data, never as pickle; other objects raise
    `TypeError`.
    """

    def _attach(
        self, groups: ProcessGroups | None, timeout: timedelta | None, debug: bool | None
    ) -> None:
        super()._attach(groups, timeout, debug)
        self._channels = Channels()

    # -- single tensors and plain data -----------------------------------------------------

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send a tensor and return when it may change; any layout in memory.

        Two ranks that both send first wait for each other. Messages that cross go out with
        `isend_tensor_dict` on gloo; nccl queues the messages of a pair in both directions, so
        they need a group for each direction there, or one batch for both (`RingComm`).

        In debug mode the receiver first says what it waits for.

        Args:
            tensor: Its shape and dtype must be what the receiver asks for.
            dst: Group rank; default: the next.

        Raises:
            ParallelConfigError: ``dst`` is no other group rank, or the tensor is sparse.
            RankMismatchError: In debug mode, when the peer waits for something else.
        """
        group, peer = self._peer(dst, self.group_next_rank, "dst")
        tensor = resolved(tensor)
        if group.debug:
            messages.announce(group, _call(tensor.shape, tensor.dtype), peer)
        wait_all(messages.isend_tensors(group, [tensor], peer, "send"))

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> Tensor:
        """Wait for a tensor.

        Args:
            size: Its shape, which must be what the peer sends: gloo ends the process when more
                arrives. The debug mode checks it.
            dtype: Its dtype.
            src: Group rank; default: the previous.

        Raises:
            ParallelConfigError: ``src`` is no other group rank.
            RankMismatchError: In debug mode, when the peer sends something else; it raises too.
        """
        group, peer = self._peer(src, self.group_prev_rank, "src")
        tensor = torch.empty(torch.Size(size), dtype=dtype, device=self.device)
        if group.debug:
            messages.answer(group, _call(tensor.shape, dtype), peer)
        if tensor.numel():
            group.irecv(tensor, peer).wait()
        return tensor

    def send_object(self, obj: Any, dst: int) -> None:
        """Send plain data to group rank ``dst``.

        Raises:
            TypeError: It is not plain data.
        """
        group, peer = self._peer(dst, dst, "dst")
        wait_all(messages.isend_object(group, obj, peer))

    def recv_object(self, src: int) -> Any:
        """Wait for plain data from group rank ``src``."""
        group, peer = self._peer(src, src, "src")
        return messages.recv_object(group, peer)

    # -- dicts of tensors ------------------------------------------------------------------

    def isend_tensor_dict(
        self, tensor_dict: TensorDict, dst: int | None = None
    ) -> list[PendingWork]:
        """Start sending tensors and plain data by name.

        Args:
            tensor_dict: Tensors must not change until their work has been waited for.
            dst: Group rank; default: the next.

        Returns:
            Works to wait for; empty for a group of one rank.

        Raises:
            TypeError: It holds something that is neither tensor nor plain data.
        """
        packed, tensors = messages.pack(tensor_dict)
        if self.world_size == 1:
            wire.encode(packed)
            return []
        group, peer = self._peer(dst, self.group_next_rank, "dst")
        works = messages.isend_object(group, packed, peer)
        return works + messages.isend_tensors(group, tensors, peer, "send tensor dict")

    def irecv_tensor_dict(
        self, src: int | None = None
    ) -> tuple[TensorDict, list[PendingWork], list[Callable[[], None]]]:
        """Wait for the header of a tensor dict and start receiving its tensors.

        Args:
            src: Group rank; default: the previous.

        Returns:
            The dict, whose tensors may be read once every work has been waited for; the works;
            and calls to make after that (always none: callers of vLLM's method expect a list).
        """
        if self.world_size == 1:
            return {}, [], []
        group, peer = self._peer(src, self.group_prev_rank, "src")
        packed = messages.recv_object(group, peer)
        specs = messages.specs_in(packed)
        tensors, works = messages.irecv_tensors(
            group, specs.values(), peer, self.device, "receive tensor dict"
        )
        found = dict(zip(specs, tensors, strict=True))
        return cast("TensorDict", messages.unpack(packed, found)), works, []

    def send_tensor_dict(
        self, tensor_dict: TensorDict, dst: int | None = None
    ) -> TensorDict | None:
        """As `isend_tensor_dict`, and wait. Returns the dict itself for a group of one rank."""
        wait_all(self.isend_tensor_dict(tensor_dict, dst))
        return tensor_dict if self.world_size == 1 else None

    def recv_tensor_dict(self, src: int | None = None) -> TensorDict | None:
        """As `irecv_tensor_dict`, and wait. Returns ``None`` for a group of one rank."""
        if self.world_size == 1:
            return None
        tensor_dict, works, _ = self.irecv_tensor_dict(src)
        wait_all(works)
        return tensor_dict

    # -- channels --------------------------------------------------------------------------

    def register_recv_channel(self, name: str, specs: Mapping[str, TensorSpec]) -> None:
        """Say beforehand what a channel will bring to this rank; optional.

        Args:
            name: The channel.
            specs: Shape, dtype and device type of each of its tensors, in order.

        Raises:
            RankMismatchError: The channel is already in use with other specs.
        """
        self._channels.register(name, specs)

    def isend_registered(
        self, name: str, tensors: Mapping[str, Tensor], dst: int | None = None
    ) -> list[PendingWork]:
        """Start sending the tensors of a channel; only the first use sends metadata.

        Args:
            name: The channel; both sides use the channels between them in the same order.
            tensors: Always of the same names, shapes, dtypes and device type.
            dst: Group rank; default: the next.

        Raises:
            RankMismatchError: The tensors differ from those of the first use.
        """
        if self.world_size == 1:
            return []
        group, peer = self._peer(dst, self.group_next_rank, "dst")
        return self._channels.isend(group, name, tensors, peer)

    def irecv_registered(
        self,
        name: str,
        src: int | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], list[PendingWork]]:
        """Start receiving the tensors of a channel; only the first use waits for metadata.

        Args:
            name: The channel.
            src: Group rank; default: the previous.
            buffers: Contiguous tensors to receive into, such as those of an earlier message of
                this channel that nothing needs any more; default: new ones.

        Returns:
            The tensors, to be read once every work has been waited for, and the works.

        Raises:
            RankMismatchError: The first message is of another channel, or brings other tensors
                than were registered, or than the buffers have room for. The sender has posted its
                tensors by then: destroy the group.
        """
        if self.world_size == 1:
            return {}, []
        group, peer = self._peer(src, self.group_prev_rank, "src")
        return self._channels.irecv(group, name, peer, self.device, buffers)

    def reset_channels(self) -> None:
        """Forget every channel; call it on all ranks of the group."""
        self._channels.clear()

    def _peer(self, rank: int | None, default: int, role: str) -> tuple[CheckedGroup, int]:
        if self.checked is None:
            msg = f"group {self.name!r} has one rank, which has no peer to exchange messages with"
            raise ParallelConfigError(msg)
        peer = self.checked.peer(default if rank is None else rank, role)
        if peer == self.rank_in_group:
            others = [other for other in range(self.world_size) if other != peer]
            msg = (
                f"{role}={peer} is this rank itself in group {self.name!r}, and a message needs "
                f"two ranks; legal here: {', '.join(map(str, others))}"
            )
            raise ParallelConfigError(msg)
        return self._direction(peer, role), peer

    def _direction(self, peer: int, role: str) -> CheckedGroup:
        """The group that carries messages between this rank and a peer."""
        return cast("CheckedGroup", self.checked)


def _call(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"shape {tuple(shape)} and dtype {str(dtype).removeprefix('torch.')}"
