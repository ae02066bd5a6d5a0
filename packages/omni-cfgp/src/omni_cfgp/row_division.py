"""Whether the rows of a call may be computed apart, which is tried before it is relied on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Mapping
from typing import Any

from omni_cfgp.denoiser import Denoiser
from omni_cfgp.outcome import Outcome
from omni_group_coordinator import GroupCoordinator, ParallelError, split_sizes
from omni_parallel_state.denoising.row_results import is_part
from omni_parallel_state.denoising.rows import RowPlan, call_flags, plan_rows

_log = logging.getLogger("omni_cfgp")


class RowDivision:
    """Plans the rows of calls, and remembers of which kinds of calls they may be divided.

    Of the first call of a kind every rank computes the whole, and a part of it again to compare:
    models whose samples see each other, and inputs that were taken for rows or not taken for
    them, are found so. That call costs up to twice its time.

    Args:
        group: The ranks.
        shared: Names of inputs without rows, beside the known ones.
    """

    def __init__(self, group: GroupCoordinator, shared: Collection[str]) -> None:
        self._group = group
        self._shared = shared
        self._verdicts: dict[Hashable, bool] = {}
        self._attention: dict[str, tuple[str, ...]] = {}
        self._remembers: dict[str, bool] = {}
        self._told: set[str] = set()

    def new_request(self) -> None:
        """Attention processors and caches may have been changed."""
        self._attention.clear()
        self._remembers.clear()

    def plan(
        self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[RowPlan | None, Outcome | None]:
        """How to divide a call; and its result, where it has been made to find that out.

        Raises:
            ParallelError: The call failed on another rank.
        """
        plan = plan_rows(args, kwargs, denoiser.parameter, self._shared)
        if plan is None:
            return None, None
        if denoiser.name not in self._attention:
            self._attention[denoiser.name] = denoiser.attention()
            self._remembers[denoiser.name] = denoiser.remembers
        if self._remembers[denoiser.name]:
            # A call more would count as a step, and each rank would judge by rows of its own.
            self._tell(f"{denoiser.name} caches features, so the rows of its calls stay together")
            return None, None
        kind = (denoiser.name, plan.dims, call_flags(args, kwargs), self._attention[denoiser.name])
        if kind in self._verdicts:
            return (plan if self._verdicts[kind] else None), None
        whole, verdict = self._try(denoiser, args, kwargs, plan)
        self._verdicts[kind] = verdict
        if not verdict:
            name = denoiser.name
            self._tell(f"the rows of calls of {name} depend on each other and stay together")
        return None, whole

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            _log.warning("%s: each call is made on one rank", text)

    def _try(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        plan: RowPlan,
    ) -> tuple[Outcome, bool]:
        world, me = self._group.world_size, self._group.rank_in_group
        sizes = split_sizes(plan.rows, world)
        start = sum(sizes[:me])
        # Before the whole call, which may take things out of its arguments.
        some = plan.take(args, kwargs, *((start, start + sizes[me]) if sizes[me] else (0, 1)))
        whole = Outcome.of(lambda: denoiser.call(*args, **kwargs))
        part = Outcome.of(lambda: denoiser.call(*some[0], **some[1]))
        if not sizes[me]:
            start, sizes[me] = 0, 1
        same = whole.error is None and part.error is None
        same = same and is_part(part.value, whole.value, start, start + sizes[me], plan.rows)
        said = self._group.all_gather_object([whole.report(), same])
        if whole.error is not None:
            raise whole.error
        for rank, (report, _) in enumerate(said):
            if report is not None:
                msg = f"{denoiser.name} failed on group rank {rank}: {report}"
                raise ParallelError(msg)
        return whole, all(agreed for _, agreed in said)
