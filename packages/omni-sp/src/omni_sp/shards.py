"""Who holds which tokens of a sequence: arithmetic that every rank can do for every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError

Order = Literal["contiguous", "zigzag"]
"""How one stream is dealt out: a run of neighbours to each rank, or (for causal attention, so that
every rank has as much to do) the r-th run from the front together with the r-th from the back."""


class Run(NamedTuple):
    """Neighbouring tokens, by their positions in the whole sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


class Piece(NamedTuple):
    """A rank's part of one segment."""

    runs: tuple[Run, ...]
    padding: int
    replicated: bool

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Segment:
    """One stream of a sequence, for example its text or its image tokens."""

    length: int
    """Tokens of the whole stream."""
    replicated: bool = False
    """Every rank holds all of it, instead of a shard."""
    padded: bool = False
    """Shards are padded at the end to one length. Attention never sees the padding."""
    unit: int = 1
    """Tokens that stay together, for example those of one row of an image."""

    def __post_init__(self) -> None:
        if self.length < 0 or self.unit < 1 or self.length % self.unit:
            msg = f"{self}: a length is 0 or more, and a multiple of the unit, which is 1 or more"
            raise ParallelConfigError(msg)
        if self.padded and (self.replicated or self.unit > 1):
            msg = f"{self}: only shards of single tokens are padded; legal: padded=False"
            raise ParallelConfigError(msg)


def shard_runs(
    length: int, world_size: int, rank: int, order: Order = "contiguous", unit: int = 1
) -> list[Run]:
    """The runs of one stream that a rank holds; sizes differ by at most one unit over the ranks.

    Args:
        length: Tokens of the stream.
        world_size: Number of ranks.
        rank: The rank.
        order: How tokens are dealt out.
        unit: Tokens that stay together.
    """
    parts, chosen = world_size, [rank]
    if order == "zigzag":
        parts, chosen = 2 * world_size, [rank, 2 * world_size - 1 - rank]
    units = length // unit
    return [
        Run(_boundary(units, parts, index) * unit, _boundary(units, parts, index + 1) * unit)
        for index in chosen
    ]


def _boundary(units: int, parts: int, index: int) -> int:
    """Where part ``index`` of a balanced split begins: `split_sizes`, but traceable."""
    return index * (units // parts) + min(index, units % parts)


def padded_run(length: int, world_size: int, rank: int) -> tuple[Run, int]:
    """The tokens of a rank's shard that is padded to the length of the others, and its padding."""
    size = -(-length // world_size)
    start, stop = min(rank * size, length), min((rank + 1) * size, length)
    return Run(start, stop), size - (stop - start)


def piece_of(segment: Segment, world_size: int, rank: int, order: Order = "contiguous") -> Piece:
    """What a rank holds of one stream, by positions in the stream."""
    if segment.replicated:
        return Piece((Run(0, segment.length),), 0, True)
    if segment.padded:
        run, padding = padded_run(segment.length, world_size, rank)
        return Piece((run,), padding, False)
    runs = shard_runs(segment.length, world_size, rank, order, segment.unit)
    return Piece(tuple(runs), 0, False)


@dataclass(frozen=True)
class SequenceShards:
    """How a sequence of one or more streams lies on the ranks.

    A rank's local sequence is, stream after stream, its shard of the stream, or all of it where
    the stream is replicated. Hashable, and all of its arithmetic is cached.

    Args:
        segments: The streams, in the order in which the model concatenates them.
        world_size: Number of ranks.
        order: How the tokens of a stream are dealt out.

    Raises:
        ParallelConfigError: No rank, or padded streams in zigzag order.
    """

    segments: tuple[Segment, ...]
    world_size: int
    order: Order = "contiguous"
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, not at every look into the caches: there are several for each attention call.
        object.__setattr__(self, "_hash", hash((self.segments, self.world_size, self.order)))
        if self.world_size < 1 or self.order not in ("contiguous", "zigzag"):
            msg = (
                f"world_size={self.world_size!r}, order={self.order!r}; legal: a world size of 1 "
                "or more, and the order 'contiguous' or 'zigzag'"
            )
            raise ParallelConfigError(msg)
        if self.order == "zigzag" and any(segment.padded for segment in self.segments):
            msg = "shards in zigzag order are not padded; use them uneven (no auto_pad) instead"
            raise ParallelConfigError(msg)

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(
        cls, lengths: int | Sequence[int], world_size: int, order: Order = "contiguous"
    ) -> SequenceShards:
        """Streams of these lengths, each split over all ranks."""
        lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        return cls(tuple(Segment(length) for length in lengths), world_size, order)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, each counted once."""
        return sum(segment.length for segment in self.segments)

    @property
    def plain(self) -> bool:
        """Whether a local tensor holds sharded tokens alone: nothing replicated, nothing padded."""
        return not any(segment.replicated or segment.padded for segment in self.segments)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What the local sequence of a rank is made of, in its order."""
        return _pieces(self, rank)

    def local_length(self, rank: int) -> int:
        """Tokens of the local sequence of a rank, padding included."""
        return sum(piece.tokens + piece.padding for piece in self.pieces(rank))

    def runs(self, rank: int) -> tuple[Run, ...]:
        """Where the sharded tokens of a rank stand in the whole sequence."""
        return _sharded_runs(self, rank)

    def replicated_runs(self) -> tuple[Run, ...]:
        """Where the tokens that every rank holds stand in the whole sequence."""
        return _joined([run for p in self.pieces(0) if p.replicated for run in p.runs])

    def sharded_length(self, rank: int) -> int:
        """Tokens that this rank alone holds."""
        return sum(run.length for run in self.runs(rank))

    def strip(self, tensor: Tensor, rank: int, dim: int = 1) -> tuple[Tensor, Tensor | None]:
        """The sharded and the replicated tokens of a rank's local tensor, without padding.

        Returns:
            The second is ``None`` where nothing is replicated.
        """
        if self.plain:
            return tensor, None
        sharded: list[Tensor] = []
        replicated: list[Tensor] = []
        at = 0
        for piece in self.pieces(rank):
            part = tensor.narrow(dim, at, piece.tokens)
            (replicated if piece.replicated else sharded).append(part)
            at += piece.tokens + piece.padding
        empty = tensor.narrow(dim, 0, 0)
        return (
            _cat(sharded, dim) if sharded else empty,
            _cat(replicated, dim) if replicated else None,
        )

    def restore(self, sharded: Tensor, replicated: Tensor | None, rank: int) -> Tensor:
        """The inverse of `strip` along dimension 1, with zeros as padding."""
        if self.plain:
            return sharded
        parts, at, copied = [], 0, 0
        for piece in self.pieces(rank):
            if piece.replicated and replicated is not None:
                parts.append(replicated.narrow(1, copied, piece.tokens))
                copied += piece.tokens
            elif not piece.replicated:
                parts.append(sharded.narrow(1, at, piece.tokens))
                at += piece.tokens
            if piece.padding:
                shape = (sharded.shape[0], piece.padding, *sharded.shape[2:])
                parts.append(sharded.new_zeros(shape))
        return _cat(parts, 1)


@lru_cache(maxsize=4096)
def _pieces(shards: SequenceShards, rank: int) -> tuple[Piece, ...]:
    pieces, offset = [], 0
    for segment in shards.segments:
        piece = piece_of(segment, shards.world_size, rank, shards.order)
        runs = (Run(run.start + offset, run.stop + offset) for run in piece.runs if run.length)
        pieces.append(piece._replace(runs=tuple(runs)))
        offset += segment.length
    return tuple(pieces)


@lru_cache(maxsize=4096)
def _sharded_runs(shards: SequenceShards, rank: int) -> tuple[Run, ...]:
    return _joined([run for p in shards.pieces(rank) if not p.replicated for run in p.runs])


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = Run(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
