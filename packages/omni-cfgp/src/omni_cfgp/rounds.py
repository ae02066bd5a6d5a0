"""The calls of denoisers between two moments at which their results are needed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch

from omni_cfgp.branches import least_loaded
from omni_cfgp.cfg_config import CFGParallelConfig
from omni_cfgp.denoiser import Denoiser
from omni_cfgp.exchange import BranchExchange, Work
from omni_cfgp.outcome import Outcome
from omni_cfgp.row_division import RowDivision
from omni_group_coordinator import GroupCoordinator, ParallelError, split_sizes
from omni_parallel_state.denoising.arguments import writes_elsewhere
from omni_parallel_state.denoising.deferred import Deferred
from omni_parallel_state.denoising.row_results import joined
from omni_parallel_state.denoising.rows import RowPlan, sample_of
from omni_parallel_state.denoising.signature import cost, fingerprint, signature
from omni_parallel_state.denoising.structure import without_content
from omni_parallel_state.denoising.waiting import Waiting, fill, perform, resolve_all

_log = logging.getLogger("omni_cfgp")


@dataclass
class _Call:
    """A call of a denoiser, of which this rank may have made a part."""

    denoiser: Denoiser
    works: list[Work]
    mine: dict[int, Outcome]
    """What this rank has done of it, by index among its works."""
    again: tuple[tuple[Any, ...], Mapping[str, Any]] | None
    """The arguments, where a rank may have to call once more; see `Rounds._call_as_often`."""
    rows: RowPlan | None
    sample: ref[Any] | None = None
    """What was denoised, of a call for a branch."""
    result: ref[Deferred] | None = None
    """What was handed out, if somebody still has it."""


@dataclass
class Statistics:
    """What the rounds of one request have been."""

    last: int | None = None
    """Number of calls of the last round."""
    calls: int = 0
    """Number of calls of all rounds."""
    shared: bool = False
    """Whether two ranks had something to do in one round."""


class Rounds:
    """Divides the calls of denoisers over ranks.

    Each rank makes its calls at once, at the place where the pipeline makes them, with the inputs
    and the state of that moment; of the others it hands out what stands for the result. A round
    ends when a result is needed. Every rank walks through the same code, and what stands for a
    result does the same on the rank that has it and on those that do not; so rounds end at the
    same place everywhere, and then all results of a round travel in one collective.

    Args:
        group: The ranks that share the branches of an image.
        config: How they are divided.
    """

    def __init__(self, group: GroupCoordinator, config: CFGParallelConfig) -> None:
        self._group = group
        self._config = config
        self._exchange = BranchExchange(group)
        self._division = RowDivision(group, config.shared_inputs)
        self._calls: list[_Call] = []
        self._loads = [0.0] * group.world_size
        self._operations: list[ref[Waiting]] = []
        self._owners: dict[int, int] = {}
        self._compared: set[Hashable] = set()
        self._busy = False
        self._told: set[str] = set()
        self._in_request = False
        self._last_sample: ref[Any] | None = None
        self.statistics = Statistics()

    @property
    def device(self) -> torch.device:
        """Where predictions arrive."""
        return self._group.device

    # -- calls -----------------------------------------------------------------------------

    def call(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of a denoiser on the rank whose turn it is.

        Returns:
            What stands for the result; the result itself where every rank made the call.
        """
        if self._busy:  # within a call of another denoiser
            return denoiser.call(*args, **kwargs)
        if torch.compiler.is_compiling():
            msg = (
                "a function that calls the denoiser is being compiled, which would fix who "
                "computes what; compile the denoiser alone: pipeline.transformer.compile()"
            )
            raise ParallelError(msg)
        args, kwargs = resolve_all(args), resolve_all(kwargs)
        if writes_elsewhere(args, kwargs):
            self._tell(
                f"calls of {denoiser.name} that pass a cache, or other objects that the call may "
                "change, are made on every rank"
            )
            return denoiser.call(*args, **kwargs)
        if self._is_asked_late(denoiser, args, kwargs):
            return denoiser.call(*args, **kwargs)
        plan = None
        if self._divides_rows():
            self._busy = True
            try:
                plan, whole = self._division.plan(denoiser, args, kwargs)
            finally:
                self._busy = False
            if whole is not None:
                self.statistics.calls += 1
                self.statistics.shared = True
                return whole.value
        call = self._by_rows(denoiser, args, kwargs, plan) if plan else None
        call = call or self._by_branch(denoiser, args, kwargs)
        self._calls.append(call)
        known = None if call.rows else self._exchange.known(call.works[0].key)
        result = Deferred(
            self, call, like=None if known is None else partial(without_content, known)
        )
        call.result = ref(result)
        return result

    def _is_asked_late(
        self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether the prediction before this one, of the same sample, was needed already.

        Then no rank has anything to do beside this call, and each makes it for itself. Of pipelines
        only: a loop of one's own may pass the same tensor in every step.
        """
        last, self._last_sample = self._last_sample, None
        if self._calls or last is None or last() is not sample_of(args, kwargs):
            return False
        self._last_sample = last
        self._tell(
            f"each prediction of {denoiser.name} is needed before the next one of its step is "
            "asked for, so the later ones are made on every rank"
        )
        return True

    def _divides_rows(self) -> bool:
        if self._config.division == "auto":
            # Calls beside each other are branches: they need no division of their batches.
            return not self._calls and self.statistics.last in (None, 1)
        return self._config.division == "rows"

    def _by_branch(
        self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Call:
        index = len(self._calls)
        owner = least_loaded(self._loads)
        if not any(call.rows for call in self._calls):
            # A branch stays with its rank: caches of features, by branch, are there.
            owner = self._owners.setdefault(index, owner)
        self._loads[owner] += cost(args, kwargs)
        key = (denoiser.name, signature(args, kwargs))
        name = f"guidance branch {index} ({denoiser.name})"
        work = Work(owner, key, name, self._fingerprint(key, args, kwargs))
        mine = {}
        if owner == self._group.rank_in_group:
            mine[0] = self._outcome(denoiser, args, kwargs)
        again = (args, kwargs) if denoiser.is_sharded else None
        sample = sample_of(args, kwargs)
        return _Call(denoiser, [work], mine, again, None, None if sample is None else ref(sample))

    def _by_rows(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plan: RowPlan,
    ) -> _Call:
        key, start = (denoiser.name, signature(args, kwargs)), 0
        inputs = self._fingerprint((*key, plan.rows), args, kwargs)
        works: list[Work] = []
        mine: dict[int, Outcome] = {}
        again = None
        for owner, size in enumerate(split_sizes(plan.rows, self._group.world_size)):
            if not size:
                break
            stop = start + size
            self._loads[owner] += cost(args, kwargs) * size / plan.rows
            some = plan.take(args, kwargs, start, stop)
            name = f"rows {start} to {stop - 1} of {denoiser.name}"
            work = Work(owner, (denoiser.name, signature(*some)), name, inputs)
            if owner == self._group.rank_in_group:
                mine[len(works)] = self._outcome(denoiser, *some)
            works.append(work)
            start = stop
        if denoiser.is_sharded:
            again = plan.take(args, kwargs, 0, 1)
        return _Call(denoiser, works, mine, again, plan)

    def _fingerprint(
        self, key: Hashable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[float, ...]:
        """Of the inputs of a call, when the first of its kind comes."""
        if key in self._compared:
            return ()
        self._compared.add(key)
        return fingerprint(args, kwargs)

    def _outcome(
        self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outcome:
        self._busy = True
        try:
            return Outcome.of(lambda: denoiser.call(*args, **kwargs))
        finally:
            self._busy = False

    # -- the end of a round ----------------------------------------------------------------

    def remember(self, operation: Waiting) -> None:
        """Take note of an operation on results of this round, to be made when they are there."""
        self._operations.append(ref(operation))

    def flush(self) -> None:
        """Exchange the results of the round, and do what was waiting for them.

        Raises:
            ParallelError: A call failed on another rank; with this rank's own error, if its did.
        """
        calls, operations = self._calls, self._operations
        self._calls, self._operations = [], []
        self._loads = [0.0] * self._group.world_size
        if not calls:
            return
        self._call_as_often(calls)
        if self._in_request and len(calls) == 1:
            self._last_sample = calls[0].sample
        works = [work for call in calls for work in call.works]
        mine: dict[int, Outcome] = {}
        offsets: list[int] = []
        for call in calls:
            offset = len(offsets)
            mine |= {offset + index: outcome for index, outcome in call.mine.items()}
            offsets += [offset] * len(call.works)
        try:
            results = self._exchange.exchange(works, mine)
        except BaseException:
            self._compared.clear()  # inputs that were found to differ are compared again
            raise
        self.statistics.last = len(calls)
        self.statistics.calls += len(calls)
        self.statistics.shared |= len({work.owner for work in works}) > 1
        for call in calls:
            found = [results.pop(0) for _ in call.works]
            if call.result is not None and (result := call.result()) is not None:
                fill(result, joined(found) if call.rows else found[0])
        for weak in operations:
            if (operation := weak()) is not None:
                perform(operation)

    def _call_as_often(self, calls: list[_Call]) -> None:
        """Call sharded denoisers as often as the busiest rank did, which gathers from all.

        What comes of it is dropped.
        """
        me = self._group.rank_in_group
        for denoiser in {call.denoiser.name: call.denoiser for call in calls}.values():
            own = [call for call in calls if call.denoiser is denoiser and call.again is not None]
            if not own:
                continue
            made = [0] * self._group.world_size
            for call in own:
                for work in call.works:
                    made[work.owner] += 1
            args, kwargs = own[-1].again or ((), {})
            for _ in range(max(made) - made[me]):
                self._outcome(denoiser, args, kwargs)

    # -- requests --------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a request: what an earlier one that was broken off has left is forgotten."""
        self._calls, self._operations = [], []
        self._loads = [0.0] * self._group.world_size
        self._owners = {}
        self._in_request, self._last_sample = True, None
        self._division.new_request()
        self._exchange.forget()
        self.statistics = Statistics(self.statistics.last)

    def settle(self) -> None:
        """End a request: have every result arrive, and raise what a rank has met in the last."""
        self.flush()
        self._in_request, self._last_sample = False, None
        try:
            self._exchange.settle()
        except BaseException:
            self._compared.clear()  # as on the rank that failed, whose flush raised
            raise

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _log.warning(text)
