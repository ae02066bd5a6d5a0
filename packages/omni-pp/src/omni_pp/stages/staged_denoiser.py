"""One denoiser that is cut into stages: its chunks here, and the calls that run them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_pp.partition import Chunk, PartitionedModel
from omni_pp.stages.stage_link import Arrival, Sent, StageLink


class LostFlowError(ParallelError):
    """A stage before has failed, so there is nothing to compute on."""


@dataclass
class Piece:
    """A call of a denoiser, or some of its rows: what moves through the pipeline.

    Attributes:
        args: Positional arguments.
        kwargs: Named ones.
        stream: Name of the streams of calls of this kind.
        value: The result, once it is here.
        error: What this rank's part of it ended with, if it did.
        status: Of the result: zero, or not where a stage failed; ``None``: there is no result.
        incoming: What the next chunk here works on, under way.
        arriving_result: The result, under way.
        around: Given a chunk and what calls the model, says what to call instead for this piece.
        is_partial: Whether its result is none of the call's, but part of what a later piece gives.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: str
    value: Any = None
    error: Exception | None = None
    status: Tensor | None = None
    incoming: Arrival | None = None
    arriving_result: Arrival | None = None
    around: Callable[[Chunk, Callable[..., Any]], Callable[..., Any]] | None = None
    is_partial: bool = False


class StagedDenoiser:
    """Runs the chunks that this rank has of a denoiser.

    Args:
        name: For messages; the same on every rank.
        partition: The model's chunks.
        call: Calls the model, with its hooks.
        group: The ranks, in the order of the stages.
        link: What they send each other.

    Attributes:
        parameters: Names of the parameters of a call.
    """

    def __init__(
        self,
        name: str,
        partition: PartitionedModel,
        call: Callable[..., Any],
        group: GroupCoordinator,
        link: StageLink,
    ) -> None:
        self.name = name
        self.partition = partition
        self._call = call
        self._group = group
        self._link = link
        self._has_run: set[str] = set()
        self.parameters = tuple(inspect.signature(partition.model.forward).parameters)

    def parameter(self, index: int) -> str:
        """Name of a positional parameter."""
        return self.parameters[index] if index < len(self.parameters) else ""

    @property
    def _last_rank(self) -> int:
        return self._group.world_size - 1

    def expect(self, piece: Piece, level: int) -> None:
        """Start receiving what a chunk works on.

        Messages are taken in the order in which they are sent. So a receive is started where the
        stage before starts the send: the same place in the program, but that the first stage's
        later chunks come after a chunk of the last stage one level up.

        Args:
            piece: The call, or some of its rows.
            level: Which of this rank's chunks.
        """
        chunk = self.partition.chunks[level]
        if not chunk.is_first and piece.incoming is None:
            stream = f"{piece.stream} chunk {chunk.index}"
            piece.incoming = self._link.expect(stream, self._group.group_prev_rank, reuse=True)

    def expect_early(self, piece: Piece, level: int) -> None:
        """As `expect`, for the piece after the one to be run; not before a chunk has run once.

        To hear of a stream's structure means to wait for the stage before, which may wait for
        what is to be run here. And a device loads a kernel at its first use, for which it waits
        for what it is about, such as a receive: it would wait for the stage before all the same.
        """
        stream = f"{piece.stream} chunk {self.partition.chunks[level].index}"
        if stream in self._has_run:
            self.expect(piece, level)

    def _expect_next(self, piece: Piece, level: int) -> None:
        """Start receiving what other stages send after this level."""
        if level + 1 == len(self.partition.chunks):
            if self._group.rank_in_group != self._last_rank:
                stream = f"{piece.stream} result"
                piece.arriving_result = self._link.expect(stream, self._last_rank, reuse=False)
        elif self._group.rank_in_group == 0:
            self.expect(piece, level + 1)

    def run(self, piece: Piece, level: int) -> None:
        """Run one chunk on what was expected, and start sending what it gives.

        Errors stay with the piece: no rank may leave before its peers know of it.

        Args:
            piece: The call, or some of its rows.
            level: Which of this rank's chunks.
        """
        chunk = self.partition.chunks[level]
        arrival, piece.incoming = piece.incoming, None
        sent: Sent | None = None

        def receive() -> Any:
            if arrival is None:
                return None
            if not arrival.wait():
                raise LostFlowError
            return arrival.value()

        def send(value: Any) -> None:
            nonlocal sent
            status = None if arrival is None else arrival.status
            stream = f"{piece.stream} chunk {chunk.index + 1}"
            sent = self._link.send(stream, value, self._group.group_next_rank, status)

        try:
            result = chunk.run(
                self._call if piece.around is None else piece.around(chunk, self._call),
                piece.args,
                piece.kwargs,
                None if chunk.is_first else receive,
                None if chunk.is_last else send,
            )
            self._has_run.add(f"{piece.stream} chunk {chunk.index}")
            if chunk.is_last:
                self._hand_out(piece, result, arrival)
        except Exception as error:
            piece.error = piece.error or error
            if sent is None:
                self._tell_of_failure(piece, level)
            if arrival is not None:
                arrival.wait()  # a message that nobody takes would be taken for the next one
        if arrival is not None:
            arrival.release(sent)
        self._expect_next(piece, level)

    def _tell_of_failure(self, piece: Piece, level: int) -> None:
        chunk = self.partition.chunks[level]
        if not chunk.is_last:
            stream = f"{piece.stream} chunk {chunk.index + 1}"
            self._link.send_failure(stream, self._group.group_next_rank)
            return
        for rank in range(self._last_rank):
            piece.value = self._link.send_failure(f"{piece.stream} result", rank)
        piece.status = None if piece.value is None else self._link.status(1)

    def _hand_out(self, piece: Piece, result: Any, arrival: Arrival | None) -> None:
        # Not the arrival's own, whose place the next one takes.
        came = None if arrival is None else arrival.status
        status = self._link.status(0) if came is None else came.clone()
        piece.value, piece.status = result, status
        for rank in range(self._last_rank):
            self._link.send(f"{piece.stream} result", result, rank, status)

    @staticmethod
    def take_result(piece: Piece) -> None:
        """Wait for a result.

        Where there is none, its status is ``None``, or not zero.
        """
        arrival, piece.arriving_result = piece.arriving_result, None
        if arrival is not None:  # the last stage has it
            arrival.wait()
            piece.status = arrival.status
            if arrival.status is not None:
                piece.value = arrival.value()
