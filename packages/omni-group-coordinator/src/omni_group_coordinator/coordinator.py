"""`GroupCoordinator`: what one group of ranks can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from omni_group_coordinator import checks, collectives, messages, wire
from omni_group_coordinator.checked_group import CheckedGroup, check_peer
from omni_group_coordinator.group_messages import GroupMessages, TensorDict
from omni_group_coordinator.payload import resolved


class GroupCoordinator(GroupMessages):
    """Collectives and messages of one group of ranks, seen from one of them.

    See `GroupMembership` for how it is built. Every tensor may have any layout in memory and any
    dtype that the backend moves (float8 travels as bytes). Lengths that differ between ranks
    are given by the caller; no rank asks another for a size. `all_reduce`, `all_gather`,
    `reduce_scatter`, `all_to_all`, `all_to_all_flat` and `broadcast` trace under
    ``torch.compile(fullgraph=True)``. A failure raises `CommunicationError` naming the group, its
    ranks and the operation.
    """

    def all_reduce(self, input_: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce over the ranks, in place; returns the tensor.

        Args:
            input_: Of the same shape and dtype on every rank.
            op: How values are combined.
        """
        if self.checked is None:
            collectives.check_reduce(input_)
            return input_
        return collectives.all_reduce(self.checked, input_, op)

    @overload
    def all_gather(
        self,
        input_: Tensor,
        dim: int = 0,
        separate_tensors: Literal[False] = False,
        group: ProcessGroup | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Tensor: ...

    @overload
    def all_gather(
        self,
        input_: Tensor,
        dim: int = 0,
        *,
        separate_tensors: Literal[True],
        group: ProcessGroup | None = None,
        lengths: Sequence[int] | None = None,
    ) -> list[Tensor]: ...

    @overload
    def all_gather(
        self,
        input_: Tensor,
        dim: int = 0,
        separate_tensors: bool = False,
        group: ProcessGroup | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]: ...

    def all_gather(
        self,
        input_: Tensor,
        dim: int = 0,
        separate_tensors: bool = False,
        group: ProcessGroup | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Collect the pieces of all ranks.

        Args:
            input_: This rank's piece; all dimensions but ``dim`` are the same on every rank.
            dim: Dimension along which pieces are joined.
            separate_tensors: Return the pieces as a list in rank order (of one, for one rank).
            group: Another group to gather over; default: this one.
            lengths: Length of each rank's piece along ``dim``; default: all equal.

        Returns:
            The joined tensor, or the list.

        Raises:
            ParallelConfigError: ``dim`` or ``lengths`` do not fit the tensor.
        """
        checked = self._over(group)
        if checked is None:
            if input_.ndim or not separate_tensors:
                checks.checked_pieces(self._alone, input_, dim, lengths)
            return [input_] if separate_tensors else input_
        if separate_tensors:
            return collectives.all_gather_pieces(checked, input_, dim, lengths)
        return collectives.all_gather(checked, input_, dim, lengths)

    def gather(
        self,
        input_: Tensor,
        dst: int = 0,
        dim: int = -1,
        *,
        lengths: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Collect the pieces of all ranks on one.

        Args:
            input_: This rank's piece.
            dst: Group rank that gets the joined tensor.
            dim: Dimension along which pieces are joined.
            lengths: Length of each rank's piece along ``dim``; default: all equal.

        Returns:
            The joined tensor on ``dst``, ``None`` elsewhere.
        """
        if self.checked is None:
            check_peer(self._alone, dst, "dst")
            checks.checked_pieces(self._alone, input_, dim, lengths)
            return input_
        return collectives.gather(self.checked, input_, dst, dim, lengths)

    def reduce_scatter(
        self,
        input_: Tensor,
        dim: int = 0,
        *,
        lengths: Sequence[int] | None = None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    ) -> Tensor:
        """Reduce over the ranks and keep this rank's piece.

        Args:
            input_: The whole tensor, of the same shape on every rank.
            dim: Dimension that is split.
            lengths: Length of each rank's piece along ``dim``; default: equal parts.
            op: SUM, MAX, MIN or PRODUCT.
        """
        if self.checked is None:
            collectives.check_reduce_scatter(self._alone, input_, dim, lengths, op)
            return input_
        return collectives.reduce_scatter(self.checked, input_, dim, lengths, op)

    def all_to_all(
        self,
        input_: Tensor,
        scatter_dim: int,
        gather_dim: int,
        *,
        scatter_lengths: Sequence[int] | None = None,
        gather_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Split along one dimension, send piece r to rank r, join what arrives along another.

        Args:
            input_: Whole along ``scatter_dim``, this rank's piece of ``gather_dim``.
            scatter_dim: Dimension that is split.
            gather_dim: Dimension that is joined; not the same one.
            scatter_lengths: Length of each rank's piece of ``scatter_dim``; default: equal.
            gather_lengths: Length of each rank's piece of ``gather_dim``; default: equal.
        """
        if self.checked is None:
            dims = (scatter_dim, gather_dim)
            checks.checked_exchange(self._alone, input_, dims, scatter_lengths, gather_lengths)
            return input_
        return collectives.all_to_all(
            self.checked, input_, scatter_dim, gather_dim, scatter_lengths, gather_lengths
        )

    def all_to_all_flat(
        self, input_: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Tensor:
        """Send consecutive pieces of a vector to the ranks, and join what arrives in rank order.

        For pieces that are no slices of one tensor, such as those of several tensors packed.

        Args:
            input_: ``(elements,)``: the piece for rank 0, then that for rank 1, and so on.
            send_sizes: Elements for each rank; they add up to the vector.
            receive_sizes: Elements from each rank.

        Returns:
            ``(sum of receive_sizes,)``.

        Raises:
            ParallelConfigError: No vector, or sizes that do not fit it.
        """
        if self.checked is None:
            collectives.check_flat(self._alone, input_, send_sizes, receive_sizes)
            return input_
        return collectives.all_to_all_flat(self.checked, input_, send_sizes, receive_sizes)

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Fill the tensor with that of group rank ``src``, in place; returns the tensor."""
        if self.checked is None:
            check_peer(self._alone, src, "src")
            return input_
        return collectives.broadcast(self.checked, input_, src)

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Give every rank the plain data of group rank ``src``.

        Raises:
            TypeError: It is not plain data (see `wire.encode`).
        """
        if self.checked is None:
            check_peer(self._alone, src, "src")
            wire.encode(obj)
            return obj
        return messages.broadcast_object(self.checked, obj, src)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """The plain data of all ranks, in rank order.

        Raises:
            TypeError: It is not plain data (see `wire.encode`).
        """
        me, ranks = self.rank_in_group, range(self.world_size)
        return [self.broadcast_object(obj if rank == me else None, rank) for rank in ranks]

    def broadcast_object_list(
        self, obj_list: list[Any], src: int = 0, group: ProcessGroup | None = None
    ) -> list[Any]:
        """As `broadcast_object`, into the list; returns the list."""
        checked = self._over(group)
        if checked is None:
            check_peer(self._alone, src, "src")
            wire.encode(obj_list)
        else:
            obj_list[:] = messages.broadcast_object(checked, obj_list, src)
        return obj_list

    def broadcast_tensor_dict(
        self,
        tensor_dict: TensorDict | None = None,
        src: int = 0,
        group: ProcessGroup | None = None,
        metadata_group: ProcessGroup | None = None,
    ) -> TensorDict | None:
        """Give every rank the tensors and plain data of group rank ``src``.

        Args:
            tensor_dict: On ``src``; not read elsewhere.
            src: Group rank.
            group: Another group for the tensors; default: this one.
            metadata_group: Another group for the header; default: ``group``.

        Returns:
            The dict; on ``src`` the one that was given.
        """
        checked = self._over(group)
        packed, tensors = messages.pack(tensor_dict)
        if checked is None:
            check_peer(self._alone, src, "src")
            wire.encode(packed)
            return tensor_dict
        header = checked if metadata_group is None else CheckedGroup.of(metadata_group)
        packed = messages.broadcast_object(header, packed, src)
        if checked.rank == src:
            for tensor in tensors:
                collectives.broadcast(checked, resolved(tensor).contiguous(), src)
            return tensor_dict
        found = {}
        for index, spec in messages.specs_in(packed).items():
            found[index] = collectives.broadcast(checked, spec.empty(self.device), src)
        return cast("TensorDict", messages.unpack(packed, found))

    def barrier(self) -> None:
        """Wait until every rank of the group is here.

        Raises:
            CommunicationError: One did not come within the timeout; on gloo the first rank's
                message names those that are missing.
        """
        if self.checked is not None:
            self.checked.barrier()

    @property
    def _alone(self) -> checks.Alone:
        return checks.Alone(self.name)

    def _over(self, group: ProcessGroup | None) -> CheckedGroup | None:
        return self.checked if group is None else CheckedGroup.of(group)


def checked_group_of(group: GroupCoordinator | ProcessGroup | None) -> CheckedGroup | None:
    """Where to post the operations of a group; ``None`` if it has one rank.

    Args:
        group: A coordinator, a torch group, or ``None`` for torch's default group.
    """
    if isinstance(group, GroupCoordinator):
        return group.checked
    checked = CheckedGroup.of(group)
    return checked if checked.size > 1 else None
