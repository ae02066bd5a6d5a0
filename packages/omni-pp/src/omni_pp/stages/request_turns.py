"""Requests that advance beside each other: one runs at a time, in an order that all ranks share."""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_parallel_state.denoising.replaced_calls import real, watch_scheduler
from omni_parallel_state.denoising.requests import agree
from omni_pp.pp_config import PipelineParallelConfig
from omni_pp.stages.failures import Failures
from omni_pp.stages.micro_batches import MicroBatches
from omni_pp.stages.stage_link import StageLink
from omni_pp.stages.stage_rounds import StageRounds


class RequestTurns:
    """Gives requests their turns.

    A request runs in a thread of its own until it needs a prediction; then the next one goes on,
    around and around. Only one runs at a time, and whose turn is next depends on nothing but the
    requests: so all ranks send and receive in the same order.

    Args:
        group: The stages.
        config: How calls are cut.
        link: What stages send each other.
        batches: What cuts calls; default: into micro-batches, as configured.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        config: PipelineParallelConfig,
        link: StageLink,
        batches: MicroBatches | None = None,
    ) -> None:
        self._group = group
        self._config = config
        self._link = link
        self._failures = Failures(group)
        chunks = group.world_size * config.virtual_stages
        limit = chunks if config.micro_batches == "auto" else config.micro_batches
        self._batches = batches or MicroBatches(limit, config.shared_inputs)
        self._alone = self.new_rounds(lambda: None)
        self._current: StageRounds | None = None

    @property
    def device(self) -> torch.device:
        """Where the stages of this rank compute."""
        return self._group.device

    @property
    def rounds(self) -> StageRounds:
        """The calls of the request whose turn it is."""
        return self._alone if self._current is None else self._current

    def run(self, pipeline: Any, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call a pipeline for each request; see `PipelineHandle.run_together`."""
        if self._current is not None:
            msg = "run_together was called within a request that runs together with others"
            raise ParallelError(msg)
        if self._group.world_size == 1:
            return [pipeline(**request) for request in requests]
        agreed = [agree(self._group, (), dict(one), self._config.seeds) for one in requests]
        ring = _Ring(len(agreed))
        runs = [_Run(self, ring, index, pipeline, one) for index, one in enumerate(agreed)]
        try:
            for run in runs:
                run.start()
            ring.wait_until_all_are_through()
        finally:
            ring.break_off()
            for run in runs:
                run.join()
            self._current = None
            for run in runs:
                run.rounds.drop()
        for run in runs:
            if run.error is not None:
                raise run.error
        return [run.output for run in runs]

    def enter(self, rounds: StageRounds) -> None:
        """It is the turn of a request with these calls."""
        self._current = rounds

    def new_rounds(self, give_way: Callable[[], None]) -> StageRounds:
        """The calls of a request that gives way to others."""
        return StageRounds(self._group, self._link, self._batches, self._failures, give_way)


class BrokenOffError(BaseException):
    """Ends a request because another one failed; no handler of the pipeline's should catch it."""


class _Ring:
    """Whose turn it is."""

    def __init__(self, count: int) -> None:
        self._condition = threading.Condition()
        self._waiting = list(range(count))
        self._broken = False

    def await_turn(self, index: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._broken or self._waiting[0] == index)
            if self._broken:
                raise BrokenOffError

    def pass_on(self, index: int) -> None:
        """Go to the end, and wait for the next turn."""
        with self._condition:
            self._waiting.append(self._waiting.pop(0))
            self._condition.notify_all()
        self.await_turn(index)

    def leave(self, index: int) -> None:
        with self._condition:
            self._waiting.remove(index)
            self._condition.notify_all()

    def break_off(self) -> None:
        with self._condition:
            self._broken = True
            self._condition.notify_all()

    def wait_until_all_are_through(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._broken or not self._waiting)


class _Run:
    """One request, in a thread of its own."""

    def __init__(
        self,
        turns: RequestTurns,
        ring: _Ring,
        index: int,
        pipeline: Any,
        request: dict[str, Any],
    ) -> None:
        self._turns, self._ring, self._index = turns, ring, index
        self._request = request
        self._pipeline = _twin(pipeline)
        self.rounds = turns.new_rounds(self._give_way)
        self._modes = _Modes(turns.device)
        self.output: Any = None
        self.error: BaseException | None = None
        context = contextvars.copy_context()  # the current state, for one
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name=f"request {index}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _give_way(self) -> None:
        self._ring.pass_on(self._index)
        self._turns.enter(self.rounds)

    def _run(self) -> None:
        try:
            self._ring.await_turn(self._index)
            self._turns.enter(self.rounds)
            with self._modes.entered():
                output = self._pipeline(**self._request)
                self.rounds.settle()
                self.output = real(output)
            self._ring.leave(self._index)
        except BrokenOffError:
            pass
        except BaseException as error:
            self.error = error
            self._ring.break_off()


class _Modes:
    """What torch keeps for each thread, as it is in the thread that makes this."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self._device = device
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextmanager
    def entered(self) -> Iterator[None]:
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device.index or 0)
        enabled, dtype = self._autocast
        with (
            torch.inference_mode(self._inference),
            torch.set_grad_enabled(self._grad),
            torch.autocast(self._device.type, dtype=dtype, enabled=enabled),
        ):
            yield


def _twin(pipeline: Any) -> Any:
    """A pipeline of the same components, with a scheduler and a state of its own."""
    twin = copy.copy(pipeline)
    twin.scheduler = copy.deepcopy(pipeline.scheduler)
    watch_scheduler(twin.scheduler)
    return twin
