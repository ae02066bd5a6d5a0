"""The messages of one step between the stages, in an order that holds when a stage fails too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from omni_group_coordinator import CommunicationError, GroupCoordinator, ParallelError
from omni_parallel_state.denoising.structure import Plain, describe, tensors_in, without_content
from omni_pp.async_latents import LATENTS, AsyncLatents, resolved
from omni_pp.mixin.host_link import HostLink
from omni_pp.stages.stage_link import Arrival

Run = Callable[..., Any]
_WORD: tuple[()] = ()  # a tree of no tensor: its status is the message


class _LostFlowError(ParallelError):
    """A stage before has failed, so there is nothing to compute on."""


class Failed:
    """In place of a result: the error that it ended with, ``None`` where a stage before failed."""

    def __init__(self, error: Exception) -> None:
        self.error = None if isinstance(error, _LostFlowError) else error


class StageSteps:
    """One rank's part in the steps of one pipeline.

    In a step each stage runs its part of every branch and sends the outcome on. Then the last one
    gives its word to all others that all went well, and the latents to those that want them. A
    stage that fails sends that there is nothing, in place of what it owes, and so do those after
    it; the last one's word is then a no. Upon that all stages meet and tell what went wrong. So
    nobody leaves while others wait, and no message is left that would be taken for another.

    Args:
        group: The stages.
        name: Tells the streams of one pipeline from those of others.
    """

    def __init__(self, group: GroupCoordinator, name: str) -> None:
        self.group = group
        self.is_last = group.rank_in_group == group.world_size - 1
        self._link = HostLink(group)
        self._name = name
        self._owed = False
        """Whether the stages after the last predictions wait for the word of the last one."""
        self._pending: list[_Step] = []
        self._likes: dict[str, Plain] = {}

    # -- predictions -----------------------------------------------------------------------

    def start(self) -> None:
        """Before predictions: what the step before has left arrives.

        Raises:
            Exception: That step has failed.
        """
        self.settle()
        self.finish()

    def run(self, work: Mapping[int, tuple[str, dict[str, Any]]], predict: Run) -> dict[int, Any]:
        """Run this stage's part of each branch; the next arrives meanwhile.

        Args:
            work: For each branch, the name of its stream and its arguments.
            predict: Called with the arguments, and with ``intermediate_tensors=``.

        Returns:
            On the last stage the result of each branch, or `Failed`; elsewhere nothing.

        Raises:
            Exception: Not on the last stage: this stage's part has failed.
            ParallelError: Not on the last stage: that of a stage before has.
        """
        self._owed = True
        found: dict[int, Any] = {}
        streams = iter([stream for stream, _ in work.values()])
        coming = self._expect(next(streams, None))
        for index, (stream, kwargs) in work.items():
            arrival, coming = coming, self._expect(next(streams, None))
            found[index] = self._run_one(stream, kwargs, predict, arrival)
        if self.is_last:
            return found
        failed = [one.error for one in found.values() if isinstance(one, Failed)]
        if failed:
            self._hear(next((error for error in failed if error is not None), None))
        return {}

    def _expect(self, stream: str | None) -> Arrival | None:
        if stream is None or self.group.rank_in_group == 0:
            return None
        # Not into reused buffers: models may keep what they are given, for caches of their own.
        return self._link.expect(
            f"{self._name} flow {stream}", self.group.group_prev_rank, reuse=False
        )

    def _run_one(
        self, stream: str, kwargs: dict[str, Any], predict: Run, arrival: Arrival | None
    ) -> Any:
        stream = f"{self._name} flow {stream}"
        try:
            if arrival is not None and not arrival.wait():
                raise _LostFlowError
            given = None if arrival is None else arrival.value()
            found = resolved(predict(**resolved(kwargs), intermediate_tensors=given))
            _check_inference(found)
            if not self.is_last:
                self._link.send(stream, found, self.group.group_next_rank)
        except CommunicationError:
            raise
        except Exception as error:
            if not self.is_last:
                self._link.send_failure(stream, self.group.group_next_rank)
            return Failed(error)
        return found

    # -- latents ---------------------------------------------------------------------------

    def give(self, stream: str, latents: Any, *, everyone: bool) -> None:
        """On the last stage: the word that all went well, and the new latents.

        Args:
            stream: Name for latents of these shapes.
            latents: A tensor, or a tuple of tensors.
            everyone: Whether all stages want them, or only the first.
        """
        self._say_well()
        # Copies: the pipeline may change its own in place while these are under way.
        tree = _copied(resolved(latents))
        for stage in range(self.group.world_size - 1) if everyone else (0,):
            self._link.send(f"{self._name} latents {stream}", tree, stage)

    def take(self, stream: str | None) -> AsyncLatents | None:
        """Elsewhere: what stands for the new latents.

        Args:
            stream: As of `give`; ``None`` if only the word comes.
        """
        self._owed = False
        step = _Step(self, stream)
        self._pending.append(step)
        if stream is None:
            return None
        known = self._likes.get(stream)
        tensors = {} if known is None else {LATENTS: without_content(known)}
        step.tensors = tensors
        return AsyncLatents(tensors, [step], [], device=self.group.device)

    def receive(self, step: _Step) -> None:
        """Have a step's latents arrive, after those of the steps before.

        Raises:
            Exception: One of these steps has failed.
        """
        while step in self._pending:
            one = self._pending.pop(0)
            self._hear()
            if one.stream is not None:
                name = f"{self._name} latents {one.stream}"
                arrival = self._link.expect(name, self.group.world_size - 1, reuse=False)
                arrival.wait()
                one.tensors[LATENTS] = arrival.value()
                self._likes[one.stream] = describe(one.tensors[LATENTS])
            one.is_here = True
        if not step.is_here:
            msg = "these latents will never arrive: the request that they belong to was broken off"
            raise ParallelError(msg)

    # -- the end of a step -----------------------------------------------------------------

    def settle(self, own: Exception | None = None) -> None:
        """Everything that was announced arrives, and errors are told that have not been.

        Args:
            own: This rank's error, if it is leaving with one.

        Raises:
            Exception: ``own``, or that of another stage, if the step has failed.
        """
        if self.is_last:
            if self._owed and own is None:
                self._say_well()
            return
        if self._pending:
            self.receive(self._pending[-1])
        if self._owed:
            self._owed = False
            self._hear(own)

    def abandon(self, error: Exception) -> None:
        """Leave with an error, which others may have met too."""
        with suppress(Exception):  # this one is on its way already
            self.settle(error)
        with suppress(Exception):
            self.finish()
        self._pending.clear()

    def finish(self) -> None:
        """Wait for everything that was sent."""
        self._link.finish()

    # -- failures --------------------------------------------------------------------------

    @contextmanager
    def telling(self, *, step: bool = False) -> Iterator[None]:
        """Tell the others of an error of the last stage within, if they wait for its word.

        Args:
            step: Whether they will, whatever was before.
        """
        self._owed |= step and self.is_last
        try:
            yield
        except CommunicationError:  # nothing can be told any more
            raise
        except Exception as error:
            if self.is_last and self._owed:
                self.fail(error)
            raise

    def fail(self, error: Exception | None) -> Exception:
        """On the last stage: tell all others that the step has failed.

        Args:
            error: What this stage failed with; ``None`` if it was one before.

        Returns:
            The error, or one with the other stage's in words.
        """
        self._owed = False
        for stage in range(self.group.world_size - 1):
            self._link.send_failure(f"{self._name} word", stage)
        return self._meet(error)

    def _say_well(self) -> None:
        self._owed = False
        for stage in range(self.group.world_size - 1):
            self._link.send(f"{self._name} word", _WORD, stage)

    def _hear(self, own: Exception | None = None) -> None:
        last = self.group.world_size - 1
        if not self._link.expect(f"{self._name} word", last, reuse=False).wait():
            raise self._meet(own)
        if own is not None:
            raise own

    def _meet(self, own: Exception | None) -> Exception:
        """All stages come here when a step has failed, and none when it has not."""
        self._owed = False
        self._pending.clear()
        said = self.group.all_gather_object(None if own is None else text_of(own))
        self.finish()
        if own is not None:
            return own
        found = [f"stage {stage} failed: {text}" for stage, text in enumerate(said) if text]
        return ParallelError("; ".join(found) or "a stage failed, and none says how")


class _Step:
    """A step whose latents are under way: the handle that `AsyncLatents` waits for."""

    def __init__(self, steps: StageSteps, stream: str | None) -> None:
        self._steps = steps
        self.stream = stream
        self.tensors: dict[str, Any] = {}
        self.is_here = False

    def wait(self) -> None:
        """Return when the latents are here; a second call does nothing."""
        self._steps.receive(self)


def text_of(error: Exception) -> str:
    """An error in words, for other ranks."""
    return f"{type(error).__name__}: {error}"


def _copied(latents: Any) -> Any:
    if isinstance(latents, tuple | list):
        return type(latents)(_copied(item) for item in latents)
    return latents.clone()


def _check_inference(value: Any) -> None:
    if any(tensor.requires_grad for tensor in tensors_in(value)):
        msg = (
            "stages over ranks are for inference, and what this one gives asks for gradients; run "
            "the pipeline under torch.no_grad() or torch.inference_mode()"
        )
        raise ParallelError(msg)
