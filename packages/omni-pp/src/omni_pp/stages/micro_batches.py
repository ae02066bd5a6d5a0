"""Cutting the rows of a call into micro-batches, which is tried before it is relied on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from omni_group_coordinator import split_sizes
from omni_parallel_state.denoising.row_results import is_part
from omni_parallel_state.denoising.rows import RowPlan, call_flags, plan_rows
from omni_parallel_state.denoising.signature import signature
from omni_parallel_state.denoising.structure import Plain
from omni_pp.stages.mask_lengths import MaskLengths
from omni_pp.stages.staged_denoiser import Piece, StagedDenoiser

_log = logging.getLogger("omni_pp")


class MicroBatches:
    """Cuts calls into pieces, and remembers of which kinds of calls they may be cut.

    The first call of a kind is made whole and in pieces, which are compared: models whose samples
    see each other, and inputs that were taken for rows or not taken for them, are found so.

    Args:
        limit: The most pieces.
        shared: Names of inputs without rows, beside the known ones.

    Attributes:
        likes: By the stream of whole calls: everything about their result but the elements.
    """

    def __init__(self, limit: int, shared: Collection[str]) -> None:
        self._limit = limit
        self._shared = shared
        self._verdicts: dict[Hashable, bool] = {}
        self._streams: dict[Hashable, str] = {}
        self._lengths = MaskLengths()
        self.likes: dict[str, Plain] = {}

    def _piece(
        self,
        denoiser: StagedDenoiser,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        lengths: Hashable,
        span: tuple[int, int] | None = None,
    ) -> Piece:
        key = (denoiser.name, signature(args, kwargs), lengths, span if lengths != () else None)
        # A number in the order of first use, which is the same on every rank.
        stream = self._streams.setdefault(key, f"{denoiser.name} {len(self._streams)}")
        return Piece(args, dict(kwargs), stream)

    def cut(
        self, denoiser: StagedDenoiser, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Division:
        """How a call is cut."""
        lengths = self._lengths.of(args, kwargs, denoiser.parameters)
        whole = self._piece(denoiser, args, kwargs, lengths)
        plan = None
        if self._limit > 1:
            plan = plan_rows(args, kwargs, denoiser.parameter, self._shared)
        kind = None if plan is None else (denoiser.name, plan.dims, call_flags(args, kwargs))
        if plan is None or self._verdicts.get(kind) is False:
            return Division(whole, [whole], [], None, known=True)
        sizes = split_sizes(plan.rows, min(plan.rows, self._limit))
        bounds = [0, *accumulate(sizes)]
        spans = list(pairwise(bounds))
        pieces = [
            self._piece(denoiser, *plan.take(args, kwargs, *span), lengths, span) for span in spans
        ]
        return Division(whole, pieces, spans, plan, known=kind in self._verdicts, kind=kind)

    def judge(self, denoiser: StagedDenoiser, division: Division) -> bool:
        """Compare a call that was made whole and in pieces; the same on every rank."""
        good = division.agrees()
        self._verdicts[division.kind] = good
        if not good:
            _log.warning(
                "the rows of calls of %s depend on each other: its batches stay whole",
                denoiser.name,
            )
        return good


class Delivery(Protocol):
    """What brings results."""

    @property
    def device(self) -> torch.device:
        """Where they arrive."""

    def arrive(self) -> None:
        """Have all of them arrive that are under way."""


class Division:
    """A call and its pieces.

    Attributes:
        whole: The call as one piece.
        pieces: What it is cut into; the whole alone where it is not.
        known: Whether it is known that calls of this kind may be cut so.
        kind: What has that in common.
        hand_out: Makes the result of a call whose pieces may arrive when others are used already;
            ``None``: they are joined.
    """

    hand_out: Callable[[Delivery], Any] | None = None

    def __init__(
        self,
        whole: Piece,
        pieces: list[Piece],
        spans: Sequence[tuple[int, int]],
        plan: RowPlan | None,
        *,
        known: bool,
        kind: Hashable = None,
    ) -> None:
        self.whole = whole
        self.pieces = pieces
        self.known = known
        self.kind = kind
        self._spans = spans
        self._rows = 0 if plan is None else plan.rows

    def agrees(self) -> bool:
        """Whether the results of the pieces are those of the whole, but for rounding."""
        return all(
            is_part(piece.value, self.whole.value, *span, self._rows)
            for piece, span in zip(self.pieces, self._spans, strict=True)
        )
