"""What is sharded during one call of a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError, split_sizes
from omni_sp.attention import ShardedAttention
from omni_sp.sp_plan import SequenceParallelInput, SequenceParallelOutput
from omni_sp.sp_sharding import gather, shard


class ShardedRegion:
    """The tensors that one call of a model has split and not yet gathered.

    A call has a region of its own, so calls of other lengths, other guidance branches and other
    models do not meet.

    Args:
        group: The ranks.
    """

    def __init__(self, group: GroupCoordinator) -> None:
        self.group = group
        self.attention = ShardedAttention(group, self._attending)
        self._streams: dict[str, tuple[int, bool]] = {}
        self._open = False

    def split(self, tensor: Tensor, plan: SequenceParallelInput, name: str, where: str) -> Tensor:
        """This rank's shard of a tensor, which from now on counts as sharded."""
        check_dims(tensor, plan.split_dim, plan.expected_dims, where)
        self._streams[name] = (tensor.shape[plan.split_dim], plan.attends)
        self._open = True
        return shard(tensor, plan.split_dim, self.group)

    def check_shares(self, where: str) -> None:
        """Check that every rank has a token to work on.

        Raises:
            ParallelError: On every rank alike, before any of them communicates: models reshape
                their tokens in ways that fail when there is none.
        """
        shares = self._attending()
        if shares and min(shares) == 0:
            tokens = [length for length, attends in self._streams.values() if attends]
            most = max(
                n for n in range(1, len(shares)) if sum(split_sizes(t, n)[-1] for t in tokens)
            )
            msg = (
                f"{where}: {' + '.join(map(str, tokens))} tokens over {len(shares)} ranks leave a "
                f"rank with none; legal here: at most {most} ranks"
            )
            raise ParallelError(msg)

    def join(self, tensor: Tensor, plan: SequenceParallelOutput, where: str) -> Tensor:
        """The whole of a sharded tensor; attention is local from now on."""
        check_dims(tensor, plan.gather_dim, plan.expected_dims, where)
        length = self._length(plan.like, where)
        local = split_sizes(length, self.group.world_size)[self.group.rank_in_group]
        if tensor.shape[plan.gather_dim] != local:
            msg = (
                f"{where}: expected {local} tokens in dimension {plan.gather_dim}, this rank's "
                f"part of {length}; found shape {tuple(tensor.shape)}"
            )
            raise ParallelError(msg)
        self._open = False
        return gather(tensor, plan.gather_dim, self.group, length)

    def close(self) -> None:
        """Check, after the call, that the region did what it is for.

        Raises:
            ParallelError: Tensors were split, and no attention ran over the whole sequence or
                nothing was gathered: the result is that of parts that never met.
        """
        if not self._streams:
            return
        if not self.attention.calls:
            msg = (
                "the model's sequence was split, but no attention came through torch's "
                "scaled_dot_product_attention, so the parts never met; use the model with its "
                "native attention backend"
            )
            raise ParallelError(msg)
        if self._open:
            msg = "the model's sequence was split and not gathered; the plan lacks an output"
            raise ParallelError(msg)

    def _attending(self) -> Sequence[int] | None:
        if not self._open:
            return None
        size = self.group.world_size
        parts = [split_sizes(length, size) for length, attends in self._streams.values() if attends]
        return [sum(shares) for shares in zip(*parts, strict=True)]

    def _length(self, like: str | None, where: str) -> int:
        if like is not None:
            if like not in self._streams:
                msg = (
                    f"{where}: gathers like {like!r}, which this call has not split; split were: "
                    f"{', '.join(self._streams) or 'none'}"
                )
                raise ParallelError(msg)
            return self._streams[like][0]
        lengths = {length for length, attends in self._streams.values() if attends}
        if len(lengths) != 1:
            msg = (
                f"{where}: tensors of {len(lengths)} different lengths were split; say by like= "
                f"which one this output belongs to: {', '.join(self._streams) or 'none'}"
            )
            raise ParallelError(msg)
        return lengths.pop()


current_region: ContextVar[ShardedRegion | None] = ContextVar("omni_sp_region", default=None)
"""The region of the model that is being called."""


def check_dims(tensor: Tensor, dim: int, expected: int | None, where: str) -> None:
    """Check a tensor's number of dimensions against the plan.

    Raises:
        ParallelError: It is another one, or has no dimension ``dim``.
    """
    if expected is not None and tensor.ndim != expected:
        msg = f"{where}: expected {expected} dimensions; found shape {tuple(tensor.shape)}"
        raise ParallelError(msg)
    if not -tensor.ndim <= dim < tensor.ndim:
        msg = f"{where}: expected a dimension {dim}; found shape {tuple(tensor.shape)}"
        raise ParallelError(msg)
