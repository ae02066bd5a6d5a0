"""Guidance over ranks for pipelines that are written for it: `CFGParallelMixin`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from omni_cfgp.branches import assign_branches
from omni_cfgp.exchange import BranchExchange, Work
from omni_cfgp.first_step import FirstSteps, agreed_inputs, agreed_latents
from omni_cfgp.guidance import Prediction, guided, guided_by_stages, rescaled, stage_scales
from omni_cfgp.outcome import Outcome
from omni_group_coordinator import GroupCoordinator, ParallelError
from omni_parallel_state import get_parallel_state
from omni_parallel_state.denoising.alike import check_alike
from omni_parallel_state.denoising.requests import Seeds
from omni_parallel_state.denoising.signature import cost, signature

_log = logging.getLogger("omni_cfgp")
_predictions, _steps = FirstSteps(), FirstSteps()
_exchanges: WeakKeyDictionary[CFGParallelMixin, BranchExchange] = WeakKeyDictionary()


class CFGParallelMixin:
    """Gives a pipeline predictions with guidance, whose branches run on different ranks.

    The pipeline has an attribute ``transformer``, and for `scheduler_step` one ``scheduler``. The
    ranks are those of the current state's ``cfg`` group; every one of them makes the same calls
    and gets the same results. Errors of one rank's branch are raised on all.
    """

    cfg_seeds: ClassVar[Seeds] = "error"
    """What happens when the latents of the ranks differ in the first step: an error on every
    rank, or every rank goes on with the latents of the first."""

    # -- predictions -----------------------------------------------------------------------

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Prediction:
        """The prediction of one step, with guidance or without.

        Args:
            do_true_cfg: Whether this step is guided; if not, only the positive branch runs.
            true_cfg_scale: Weight of the guidance.
            positive_kwargs: For `predict_noise`, of the branch with the prompt.
            negative_kwargs: Of the branch with the negative prompt; may be of other lengths.
            cfg_normalize: Give the result the length of the positive prediction.
            output_slice: Keep so many tokens: ``prediction[:, :output_slice]``.
            kwargs: Passed on to `combine_cfg_noise`.

        Returns:
            The prediction, on every rank.

        Raises:
            ParallelError: The branches differ in shape or dtype, or one failed on another rank.
        """
        if not do_true_cfg:
            return _sliced(self.predict_noise(**positive_kwargs), output_slice)
        if negative_kwargs is None:
            msg = "guidance needs the inputs of a negative branch; pass negative_kwargs"
            raise ParallelError(msg)
        positive, negative = self._branches([positive_kwargs, negative_kwargs], output_slice)
        more = {} if kwargs is None else {"kwargs": kwargs}
        return self.combine_cfg_noise(positive, negative, true_cfg_scale, cfg_normalize, **more)

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> Prediction:
        """As `predict_noise_maybe_with_cfg`, of any number of branches on any number of ranks.

        Args:
            do_true_cfg: Whether this step is guided; if not, only the first branch runs.
            true_cfg_scale: As `combine_multi_branch_cfg_noise` takes it.
            branches_kwargs: For `predict_noise`, of each branch.
            cfg_normalize: Give the result the length of the first prediction.
            output_slice: Keep so many tokens.
        """
        if not branches_kwargs:
            msg = "guidance of no branch; pass the inputs of one branch or more"
            raise ParallelError(msg)
        if not do_true_cfg:
            return _sliced(self.predict_noise(**branches_kwargs[0]), output_slice)
        predictions = self._branches(branches_kwargs, output_slice)
        return self.combine_multi_branch_cfg_noise(predictions, true_cfg_scale, cfg_normalize)

    def _branches(
        self, branches: Sequence[dict[str, Any]], output_slice: int | None
    ) -> list[Prediction]:
        group = get_parallel_state().cfg
        if group.world_size > 1 and _predictions.is_first(getattr(self, "scheduler", self) or self):
            branches = agreed_inputs(group, branches, self.cfg_seeds)
        owners = assign_branches([cost((), branch) for branch in branches], group.world_size)
        works = [
            Work(owner, (index, output_slice, signature((), branch)), f"guidance branch {index}")
            for index, (owner, branch) in enumerate(zip(owners, branches, strict=True))
        ]

        def predict(branch: dict[str, Any]) -> Prediction:
            return _sliced(self.predict_noise(**branch), output_slice)

        if group.world_size == 1:
            found = [predict(branch) for branch in branches]
        else:
            mine = {
                index: Outcome.of(partial(predict, branches[index]))
                for index, owner in enumerate(owners)
                if owner == group.rank_in_group
            }
            found = _exchange_of(self, group).exchange(works, mine)
        check_alike(found)
        return found

    def predict_noise(self, *args: Any, **kwargs: Any) -> Prediction:
        """One branch's prediction: the first output of ``self.transformer``."""
        transformer: Callable[..., Any] = self.transformer  # type: ignore[attr-defined]
        prediction: Prediction = transformer(*args, **kwargs)[0]
        return prediction

    # -- combination -----------------------------------------------------------------------

    def combine_cfg_noise(
        self,
        positive_noise_pred: Prediction,
        negative_noise_pred: Prediction,
        true_cfg_scale: float,
        cfg_normalize: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> Prediction:
        """``negative + scale * (positive - negative)``, of each element of tuples.

        Args:
            positive_noise_pred: Of the branch with the prompt.
            negative_noise_pred: Of the branch with the negative prompt.
            true_cfg_scale: Weight of the guidance.
            cfg_normalize: Give the result the length of the positive prediction.
            kwargs: For pipelines that override this; not used here.
        """

        def combine(positive: Tensor, negative: Tensor) -> Tensor:
            found = guided(positive, negative, true_cfg_scale)
            return self.cfg_normalize_function(positive, found) if cfg_normalize else found

        return _each(combine, [positive_noise_pred, negative_noise_pred])

    def combine_multi_branch_cfg_noise(
        self,
        predictions: list[Prediction],
        true_cfg_scale: float | dict[str, float],
        cfg_normalize: bool = False,
    ) -> Prediction:
        """Guidance by stages; see `guided_by_stages`.

        Args:
            predictions: Of the branches, that with all conditions first, that with none last.
            true_cfg_scale: A number for two branches; else a scale for each step from a branch
                to the next, in order.
            cfg_normalize: Give the result the length of the first prediction.

        Raises:
            ParallelConfigError: A branch would count for nothing, for want of a scale.
        """
        scales = stage_scales(true_cfg_scale, len(predictions))

        def combine(*of_branches: Tensor) -> Tensor:
            found = guided_by_stages(of_branches, scales)
            return self.cfg_normalize_function(of_branches[0], found) if cfg_normalize else found

        return _each(combine, predictions)

    def cfg_normalize_function(self, noise_pred: Tensor, comb_pred: Tensor) -> Tensor:
        """The combined prediction at the length of the conditional one; zeros stay zeros."""
        return rescaled(noise_pred, comb_pred)

    def check_cfg_parallel_validity(self, true_cfg_scale: float, has_neg_prompt: bool) -> bool:
        """Whether the ranks of the cfg group will have something to do; if not, a warning."""
        ranks = get_parallel_state().cfg.world_size
        if ranks == 1 or (true_cfg_scale > 1 and has_neg_prompt):
            return True
        why = f"the guidance scale {true_cfg_scale:g} is not above 1"
        if not has_neg_prompt:
            why = "there is no negative prompt"
        _log.warning("%s, so %d of the %d ranks of the cfg group idle", why, ranks - 1, ranks)
        return False

    # -- steps -----------------------------------------------------------------------------

    def diffuse(self, *args: Any, **kwargs: Any) -> Any:
        """The denoising loop, which the pipeline writes."""
        raise NotImplementedError

    def scheduler_step(
        self,
        noise_pred: Any,
        t: Any,
        latents: Any,
        per_request_scheduler: Any | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The latents of the next step.

        Args:
            noise_pred: The prediction.
            t: The time of this step.
            latents: Of this step.
            per_request_scheduler: In place of ``self.scheduler``.
            generator: For schedulers that draw random numbers; seeded alike on every rank.

        Raises:
            ValueError: There is no scheduler.
            TypeError: It has no method ``step``.
        """
        scheduler = _scheduler(self, per_request_scheduler)
        more = {} if generator is None else {"generator": generator}
        return scheduler.step(noise_pred, t, latents, return_dict=False, **more)[0]

    def scheduler_step_maybe_with_cfg(
        self,
        noise_pred: Any,
        t: Any,
        latents: Any,
        do_true_cfg: bool,
        per_request_scheduler: Any | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """As `scheduler_step`, which every rank does for itself.

        In the first step of a request the ranks compare their latents; see `cfg_seeds`.

        Raises:
            RankMismatchError: They differ: the ranks were seeded differently.
        """
        group = get_parallel_state().cfg
        if group.world_size > 1 and _steps.is_first(_scheduler(self, per_request_scheduler)):
            latents = agreed_latents(group, latents, self.cfg_seeds)
        return self.scheduler_step(noise_pred, t, latents, per_request_scheduler, generator)


def _scheduler(pipeline: object, given: Any | None) -> Any:
    scheduler = getattr(pipeline, "scheduler", None) if given is None else given
    if scheduler is None:
        msg = f"{type(pipeline).__name__} has no scheduler; set one, or pass per_request_scheduler"
        raise ValueError(msg)
    if not callable(getattr(scheduler, "step", None)):
        msg = f"the scheduler, a {type(scheduler).__name__}, has no method step"
        raise TypeError(msg)
    return scheduler


def _exchange_of(pipeline: CFGParallelMixin, group: GroupCoordinator) -> BranchExchange:
    """Of one pipeline: what others predict of the same inputs may look otherwise."""
    found = _exchanges.get(pipeline)
    if found is None or found.group is not group:
        found = _exchanges[pipeline] = BranchExchange(group)
    return found


def _sliced(prediction: Prediction, tokens: int | None) -> Prediction:
    if tokens is None:
        return prediction
    if isinstance(prediction, tuple):
        return tuple(item[:, :tokens] for item in prediction)
    return prediction[:, :tokens]


def _each(combine: Callable[..., Tensor], predictions: Sequence[Prediction]) -> Prediction:
    """Combine tensors, or each element of tuples."""
    if isinstance(predictions[0], tuple):
        return tuple(combine(*items) for items in zip(*predictions, strict=True))
    return combine(*predictions)
