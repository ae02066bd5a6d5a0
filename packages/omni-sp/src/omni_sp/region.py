"""What is sharded during one call of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_sp.agreement import agreed
from omni_sp.joining import check_dims, gather_pieces
from omni_sp.plan_entries import (
    REST,
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelOutput,
)
from omni_sp.shards import Order, Piece, Segment, piece_of

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Stream:
    """One split tensor: a stream of tokens, or what goes with one."""

    segment: Segment
    """How it lies on the ranks."""
    attends: bool
    """Whether its tokens attend."""
    is_open: bool = True
    """Whether it has not been gathered yet."""


class ShardedRegion:
    """The tensors that one call of a model has split and not yet gathered.

    A call has a region of its own, so calls of other lengths, other guidance branches and other
    models do not meet. All arithmetic, no communication but the gathers; traced by torch.compile.

    Args:
        group: The ranks.
        order: How tokens are dealt out.
        masks: Names of split inputs whose whole is needed for masks later on.

    Attributes:
        attended: Whether some attention ran over a whole sequence.
        watched: Whether ranks agree, before they communicate, that all of them will.
        refused: Whether they did not.
    """

    def __init__(
        self, group: GroupCoordinator, order: Order, masks: frozenset[str] = frozenset()
    ) -> None:
        self.group = group
        self.order = order
        self.refused = False
        self.attended = False
        self.watched = False
        self._masks = masks
        self._streams: dict[str, Stream] = {}
        self._wholes: dict[str, Tensor] = {}
        self._halfway: dict[str, bool] = {}

    # -- splitting and joining -------------------------------------------------------------

    def split(
        self, tensor: Tensor, plan: SequenceParallelInput, name: str, where: str, unit: int = 1
    ) -> Tensor:
        """This rank's shard of a tensor, which from now on counts as sharded.

        Args:
            tensor: The whole tensor.
            plan: How to split it.
            name: By which streams and masks refer to it.
            where: Module and parameter, for messages.
            unit: Tokens that stay together.
        """
        if plan.if_dims is not None and tensor.ndim != plan.if_dims:
            return tensor
        check_dims(tensor, plan.split_dim, plan.expected_dims, where)
        length = tensor.shape[plan.split_dim]
        if plan.like is not None:
            segment = self.stream(plan.like, where).segment
            if length == 1 and segment.length != 1:
                return tensor
            if length != segment.length:
                msg = (
                    f"{where}: expected {segment.length} tokens in dimension {plan.split_dim}, as "
                    f"many as {plan.like!r} has; found shape {tuple(tensor.shape)}"
                )
                raise ParallelError(msg)
        else:
            segment = self.new_segment(length, plan.auto_pad, unit, where)
        self._check_open(name, plan, length, where)
        self._streams[name] = Stream(segment, plan.attends)
        if name in self._masks:
            self._wholes[name] = tensor
        return self.shard(tensor, plan.split_dim, segment)

    def _check_open(self, name: str, plan: SequenceParallelInput, length: int, where: str) -> None:
        stream = self._streams.get(name)
        if stream is None or not (stream.is_open and stream.attends and plan.attends):
            return
        if length != stream.segment.length:
            msg = (
                f"{where}: {name!r} is split already, {stream.segment.length} tokens, and comes "
                f"here with {length}; split a stream once, where it enters the blocks"
            )
            raise ParallelError(msg)

    def new_segment(self, length: int, padded: bool, unit: int, where: str) -> Segment:
        """How a stream of this length lies on the ranks; whole on each if some would have none."""
        if length % unit:
            msg = f"{where}: {length} tokens are no multiple of {unit}, which are to stay together"
            raise ParallelError(msg)
        parts = self.group.world_size * (2 if self.order == "zigzag" else 1)
        if length // unit < parts:  # some rank would hold nothing, which models do not expect
            return Segment(length, replicated=True)
        return Segment(length, padded=padded and unit == 1, unit=unit)

    def piece(self, segment: Segment) -> Piece:
        """What this rank holds of a stream."""
        return piece_of(segment, self.group.world_size, self.group.rank_in_group, self.order)

    def shard(self, tensor: Tensor, dim: int, segment: Segment) -> Tensor:
        """This rank's part of a tensor that lies on the ranks as the segment says."""
        if segment.replicated:
            return tensor
        piece = self.piece(segment)
        parts = [tensor.narrow(dim, run.start, run.stop - run.start) for run in piece.runs]
        mine = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        if piece.padding:
            mine = pad(mine, (0, 0) * (tensor.ndim - 1 - dim % tensor.ndim) + (0, piece.padding))
        return mine

    def join(self, tensor: Tensor, plan: SequenceParallelOutput, where: str) -> Tensor:
        """The whole of a sharded tensor; attention of its stream is local from now on."""
        check_dims(tensor, plan.gather_dim, plan.expected_dims, where)
        name = plan.like or self._only_stream(where)
        stream = self.stream(name, where)
        stream.is_open = False
        dim, segment = plan.gather_dim, stream.segment
        self.agreed(where, self._check_part, tensor, dim, segment, where)
        if segment.replicated:
            return tensor
        return gather_pieces(tensor, dim, segment, self.group, self.order)

    def _check_part(self, tensor: Tensor, dim: int, segment: Segment, where: str) -> None:
        local = self.local_length(segment)
        if tensor.shape[dim] != local:
            msg = (
                f"{where}: expected {local} tokens in dimension {dim}, this rank's part of "
                f"{segment.length}; found shape {tuple(tensor.shape)}"
            )
            raise ParallelError(msg)

    def agreed(self, where: str, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a check returns; in a watched call once it has raised on no rank."""
        if self.watched and not torch.compiler.is_compiling():
            try:
                return agreed(self.group, where, check, *args, **kwargs)
            except BaseException:
                self.refused = True
                raise
        return check(*args, **kwargs)

    def local_length(self, segment: Segment) -> int:
        """Tokens of this rank's part, padding included."""
        piece = self.piece(segment)
        return sum(run.stop - run.start for run in piece.runs) + piece.padding

    # -- attention -------------------------------------------------------------------------

    def is_open(self, plan: SequenceParallelAttention, where: str) -> bool:
        """Whether the streams of an attention call are split right now.

        Raises:
            ParallelError: Some are and some are not.
        """
        names = {*self.names(plan.streams), *self.names(plan.kv_streams or ())}
        found = {name in self._streams and self._streams[name].is_open for name in names}
        if len(found) > 1:
            msg = (
                f"{where} attends over {', '.join(sorted(names))}, of which some are split and "
                "some are not; the plan must split and gather them together"
            )
            raise ParallelError(msg)
        return True in found

    def names(self, streams: tuple[str, ...]) -> list[str]:
        """The streams that are meant, without the rest: all that attend if none are named."""
        if streams:
            return [name for name in streams if name != REST]
        return [name for name, stream in self._streams.items() if stream.attends]

    def segments(self, streams: tuple[str, ...], local: int, where: str) -> tuple[Segment, ...]:
        """How tokens that some streams make together lie on the ranks.

        Args:
            streams: Their names in order; see `SequenceParallelAttention`.
            local: How many of the tokens this rank holds.
            where: The attention call, for messages.
        """
        known = [self.stream(name, where).segment for name in self.names(streams)]
        held = sum(self.local_length(segment) for segment in known)
        rest = local - held
        # In this order: the rest may be a size that a trace does not know, but for its sign.
        if (REST not in streams and rest != 0) or rest < 0:
            msg = (
                f"{where} has {local} tokens on this rank; expected {held}, what it holds of "
                f"{' + '.join(f'{segment.length}' for segment in known)} by the streams "
                f"{', '.join(self.names(streams))}. Say in the plan what this module attends "
                "over; LOCAL_ATTENTION if its keys are not split"
            )
            raise ParallelError(msg)
        if REST not in streams:
            return tuple(known)
        at = streams.index(REST)
        return (*known[:at], Segment(rest, replicated=True), *known[at:])

    def first_of_two(self, where: str) -> bool:
        """True and false in turn, for each place."""
        self._halfway[where] = not self._halfway.get(where, False)
        return self._halfway[where]

    def mask(self, plan: SequenceParallelAttention, tensor: Tensor, where: str) -> Tensor | None:
        """The key mask of all tokens, from those of the whole streams; ``None`` if none has one.

        Args:
            plan: Says which input is the mask of which stream.
            tensor: Any tensor of the call, for batch and device.
            where: The attention call, for messages.
        """
        names = self.names(plan.kv_streams or plan.streams)
        if not any(mask in self._wholes for mask in plan.masks.values()):
            return None
        parts = []
        for name in names:
            length = self.stream(name, where).segment.length
            mask = self._wholes.get(plan.masks.get(name, ""))
            if mask is None:
                mask = torch.ones(tensor.shape[0], length, dtype=torch.bool, device=tensor.device)
            if mask.is_floating_point():
                msg = (
                    f"{where}: {plan.masks[name]!r} is a key mask of dtype {mask.dtype}; legal: "
                    "bool or integers, where true attends"
                )
                raise ParallelError(msg)
            parts.append(mask.to(torch.bool))
        return torch.cat(parts, 1)[:, None, None, :]

    # -- names -----------------------------------------------------------------------------

    def stream(self, name: str, where: str) -> Stream:
        """A stream by its name.

        Raises:
            ParallelError: This call has not split it.
        """
        if name not in self._streams:
            msg = (
                f"{where}: refers to {name!r}, which this call has not split; split were: "
                f"{', '.join(self._streams) or 'none'}"
            )
            raise ParallelError(msg)
        return self._streams[name]

    def _only_stream(self, where: str) -> str:
        names = self.names(())
        if len(names) != 1:
            msg = (
                f"{where}: {len(names)} streams attend; say by like= which one this output "
                f"belongs to: {', '.join(names) or 'none was split'}"
            )
            raise ParallelError(msg)
        return names[0]

    def close(self) -> None:
        """Check, after the call, that the region did what it is for.

        Raises:
            ParallelError: Tensors were split, and no attention ran over the whole sequence or
                some were never gathered: the result is that of parts that never met.
        """
        streams = {name: stream for name, stream in self._streams.items() if stream.attends}
        if all(stream.segment.replicated for stream in streams.values()):
            return
        if not self.attended:
            msg = (
                "the model's sequence was split, but no attention ran over the whole of it, so the "
                "parts never met; name its attention modules in the plan"
            )
            raise ParallelError(msg)
        if all(stream.is_open for stream in streams.values()):
            msg = "the model's sequence was split and not gathered; the plan lacks an output"
            raise ParallelError(msg)
