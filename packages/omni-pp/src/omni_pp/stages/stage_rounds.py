"""The calls of denoisers between two moments at which their results are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch

from omni_group_coordinator import GroupCoordinator, ParallelError, RankMismatchError
from omni_parallel_state.denoising.arguments import writes_elsewhere
from omni_parallel_state.denoising.deferred import Deferred
from omni_parallel_state.denoising.row_results import joined
from omni_parallel_state.denoising.signature import fingerprint, same_inputs, signature
from omni_parallel_state.denoising.structure import describe, without_content
from omni_parallel_state.denoising.waiting import Waiting, fill, perform, resolve_all
from omni_pp.stages.failures import Failures
from omni_pp.stages.micro_batches import Division, MicroBatches
from omni_pp.stages.stage_link import StageLink
from omni_pp.stages.staged_denoiser import Piece, StagedDenoiser


@dataclass
class _Call:
    """A call of a denoiser, under way."""

    denoiser: StagedDenoiser
    kind: str
    """Name of the streams of the whole call."""
    pieces: list[Piece]
    result: ref[Deferred] | None = None
    """What was handed out, if somebody still has it."""


class StageRounds:
    """Moves the calls of one request through the stages.

    Every rank walks through the same code. When it calls a denoiser, each stage runs its first
    chunk of it at once, as soon as the stage before has sent its part, and hands out what stands
    for the result; so the next call, of another branch, fills the pipeline. When a result is
    needed, the chunks that are left are run, in the order of the calls, and the last stage's
    results arrive on every rank.

    Args:
        group: The stages.
        link: What they send each other.
        batches: How calls are cut into micro-batches.
        failures: What tells every rank of a stage that failed.
        give_way: Called where other requests may go first.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        link: StageLink,
        batches: MicroBatches,
        failures: Failures,
        give_way: Callable[[], None] = lambda: None,
    ) -> None:
        self._group = group
        self._link = link
        self._batches = batches
        self._failures = failures
        self._give_way = give_way
        self._calls: list[_Call] = []
        self._following: list[_Call] = []
        self._operations: list[ref[Waiting]] = []
        self._compared: set[str] = set()
        self._busy = False

    @property
    def device(self) -> torch.device:
        """Where predictions arrive."""
        return self._group.device

    def begin(self) -> None:
        """A new request: the ranks compare their inputs anew."""
        self.drop()
        self._compared.clear()

    def drop(self) -> None:
        """Break off: what is under way arrives, for messages must be taken, and is forgotten."""
        calls, self._calls = self._calls, []
        self._operations.clear()
        if calls:
            self._receive(calls)
        self._take(self._following)
        self._following.clear()
        self._failures.clear()

    def settle(self) -> None:
        """The end of a request: everything arrives, and errors are told that waited."""
        self.flush()
        self.arrive()
        self._link.finish()
        self._failures.settle()

    # -- calls -----------------------------------------------------------------------------

    def call(self, denoiser: StagedDenoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start a call of a denoiser.

        Returns:
            What stands for the result.

        Raises:
            RankMismatchError: The ranks were given different inputs.
            ParallelError: The call is being compiled, or made within another one.
        """
        self._check_place(denoiser)
        args, kwargs = resolve_all(args), resolve_all(kwargs)
        division = self._batches.cut(denoiser, args, kwargs)
        self._compare(denoiser, division.whole.stream, args, kwargs)
        call = _Call(denoiser, division.whole.stream, division.pieces)
        if division.hand_out is not None:
            self._follow(call)
            return division.hand_out(self)
        if not division.known:
            self._try(call, division)
            result = Deferred(self, call)
            fill(result, self._value(call))
            return result
        self._run(call, 0)
        self._calls.append(call)
        known = self._batches.likes.get(call.kind)
        like = None if known is None else partial(without_content, known)
        result = Deferred(self, call, like=like)
        call.result = ref(result)
        if writes_elsewhere(args, kwargs):
            self.flush()  # before anything else reads or writes there
        return result

    def _try(self, call: _Call, division: Division) -> None:
        """Make a call whole and in pieces, to see whether it may be cut."""
        self.flush()
        whole = _Call(call.denoiser, call.kind, [division.whole])
        for one in (whole, call):
            self._run(one, 0)
        self._finish([whole, call])
        if not self._batches.judge(call.denoiser, division):
            call.pieces = whole.pieces

    def _follow(self, call: _Call) -> None:
        """Run a call whose pieces follow those of the call before, which has arrived by then."""
        self.flush()
        for level in range(len(call.denoiser.partition.chunks)):
            self._run(call, level)
        earlier, self._following = self._following, [call]
        self._arrive(earlier)

    def arrive(self) -> None:
        """Have all pieces arrive of calls that follow each other.

        Raises:
            ParallelError: A stage failed; on every rank alike.
        """
        calls, self._following = self._following, []
        self._arrive(calls)

    def _arrive(self, calls: list[_Call]) -> None:
        self._take(calls)
        self._link.finish_older()
        try:
            self._failures.note([piece for call in calls for piece in call.pieces])
        except BaseException:
            self._take(self._following)
            self._following.clear()
            raise

    @staticmethod
    def _take(calls: list[_Call]) -> None:
        for call in calls:
            for piece in call.pieces:
                call.denoiser.take_result(piece)

    def _check_place(self, denoiser: StagedDenoiser) -> None:
        if torch.compiler.is_compiling():
            msg = (
                f"a function that calls {denoiser.name} is being compiled, and messages between "
                "stages do not trace; compile the blocks: model.compile_repeated_blocks()"
            )
            raise ParallelError(msg)
        if self._busy:
            msg = (
                f"{denoiser.name} was called within a call of a denoiser that is cut into stages "
                "too; name one of them in denoisers="
            )
            raise ParallelError(msg)

    def _compare(
        self,
        denoiser: StagedDenoiser,
        kind: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """The first call of a kind in a request: whether the stages were given the same."""
        if kind in self._compared:
            return
        self._compared.add(kind)
        shapes = repr(signature(args, kwargs))
        first, *others = self._group.all_gather_object([shapes, fingerprint(args, kwargs)])
        for rank, (other, values) in enumerate(others, start=1):
            if other != first[0]:
                found = f"{other} and {first[0]}"
            elif not same_inputs(tuple(values), tuple(first[1])):
                found = "their shapes are equal, their values are not"
            else:
                continue
            self._compared.clear()
            msg = (
                f"{denoiser.name} was given other inputs on stage {rank} than on stage 0: {found}; "
                "every rank calls the pipeline alike, with generators of the same seed"
            )
            raise RankMismatchError(msg)

    # -- work ------------------------------------------------------------------------------

    def _run(self, call: _Call, level: int) -> None:
        """Run one chunk for each piece of a call; the next piece arrives meanwhile."""
        denoiser, pieces = call.denoiser, call.pieces
        self._busy = True
        try:
            for index, piece in enumerate(pieces):
                denoiser.expect(piece, level)
                if index + 1 < len(pieces):
                    denoiser.expect_early(pieces[index + 1], level)
                denoiser.run(piece, level)
        finally:
            self._busy = False

    def flush(self) -> None:
        """Have every prediction that is under way arrive.

        Raises:
            ParallelError: A stage failed; on every rank alike.
        """
        if not self._calls:
            return
        self._give_way()
        calls, self._calls = self._calls, []
        self._finish(calls)
        operations, self._operations = self._operations, []
        for call in calls:
            result = call.result() if call.result is not None else None
            if result is not None:
                fill(result, self._value(call))
        for weak in operations:
            operation = weak()
            if operation is not None:
                perform(operation)

    def _finish(self, calls: list[_Call]) -> None:
        """Have calls arrive, and all ranks hear of failures."""
        self._failures.note(self._receive(calls))

    def _receive(self, calls: list[_Call]) -> list[Piece]:
        """Run the chunks that are left, and receive the results."""
        for level in range(1, max(len(call.denoiser.partition.chunks) for call in calls)):
            for call in calls:
                self._run(call, level)
        pieces = [(call.denoiser, piece) for call in calls for piece in call.pieces]
        for denoiser, piece in pieces:
            denoiser.take_result(piece)
        self._link.finish()
        return [piece for _, piece in pieces]

    def _value(self, call: _Call) -> Any:
        values = [piece.value for piece in call.pieces if not piece.is_partial]
        value = values[0] if len(values) == 1 else joined(values)
        self._batches.likes[call.kind] = describe(value)
        return value

    def remember(self, operation: Waiting) -> None:
        """Take note of an operation on predictions that are under way, to be made by `flush`."""
        self._operations.append(ref(operation))
