"""Stages over ranks for pipelines that are written for them: `PipelineParallelMixin`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, ParallelError
from omni_parallel_state import get_parallel_state
from omni_pp.async_latents import AsyncLatents, resolved
from omni_pp.mixin.branches import Prediction, StagedBranches
from omni_pp.mixin.decode_guard import guard_decode
from omni_pp.mixin.host_link import stream_name
from omni_pp.mixin.wrapping import check_class_order, wrap_method

__all__ = ["AsyncLatents", "PipelineParallelMixin"]

_branches: WeakKeyDictionary[PipelineParallelMixin, StagedBranches] = WeakKeyDictionary()
_numbers: WeakKeyDictionary[GroupCoordinator, Iterator[int]] = WeakKeyDictionary()
_running: ContextVar[tuple[int, ...]] = ContextVar("omni_pp_running", default=())


class PipelineParallelMixin:
    """Runs the denoiser of a pipeline in stages on different ranks.

    It stands before `CFGParallelMixin` in the bases: ``class Mine(PipelineParallelMixin,
    CFGParallelMixin)``; the class is refused otherwise. The stages are the ranks of the current
    state's ``pp`` group; with one, everything is as without this class. All ranks run the same
    loop, `diffuse`, on the same inputs.

    **What the pipeline writes.** `predict_noise` gets, beside its own arguments,
    ``intermediate_tensors=``: what the stage before returned, ``None`` on the first. On the last
    stage it returns the prediction (a tensor or a tuple of tensors), on others what goes to the
    next: a tensor, or tuples, lists and dicts of tensors, of which everything but the content of
    the tensors stays the same for inputs of the same shapes. What it returns must not change until
    the next prediction is asked for. That of this class calls ``self.transformer``.

    **What comes back.** Predictions are there on the last stage, elsewhere ``None``. Only the last
    one steps its scheduler, so a generator advances on that stage alone. The first gets the new
    latents as `AsyncLatents`, and those in the middle too, with `pp_latents_on` ``"all"``. A result
    of `diffuse` holds real tensors.

    **Guidance.** Branches run one behind the other, so that stages work on several at once; with a
    ``cfg`` group beside the stages each of its columns runs a part of them.

    **Errors** of `predict_noise` on any stage, and of all that the last one does from then to the
    end of its scheduler's step, are raised on every stage, after which the next request may
    follow. Not covered: an error elsewhere in the loop, on some ranks alone. Others then wait,
    until that process ends or the timeout of the group passes.

    The end of `diffuse` also waits for what is still being sent; a loop that runs outside of it
    leaves that to the next prediction.

    The autoencoder that ``__init__`` leaves as ``self.vae`` decodes on the first stage alone, and
    gives ``(None,)`` on the others, but for one that is distributed itself; see `guard_decode`.
    """

    pp_latents_on: ClassVar[Literal["all", "ends"]] = "all"
    """Which stages get the new latents: all, or the first and the last, which work with them;
    those in the middle then keep the ones they have, and no latents travel to them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the order of the bases, and wrap ``__init__`` and `diffuse`.

        Raises:
            TypeError: `CFGParallelMixin` is missing, or comes first.
            ParallelConfigError: `pp_latents_on` is not one of its values.
        """
        super().__init_subclass__(**kwargs)
        check_class_order(cls, PipelineParallelMixin)
        if cls.pp_latents_on not in ("all", "ends"):
            msg = f"pp_latents_on={cls.pp_latents_on!r} is unknown; legal: 'all', 'ends'"
            raise ParallelConfigError(msg)
        wrap_method(cls, "__init__", _guarding)
        wrap_method(cls, "diffuse", _diffusing)

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
    ) -> Prediction | None:
        """The prediction of one step, on the last stage; arguments as of the guidance mixin.

        Returns:
            The prediction, of the shape that the denoiser gives; ``None`` but on the last stage.

        Raises:
            ParallelError: A stage or a branch failed on another rank, or the branches differ in
                shape or dtype, or guidance has no negative branch.
            RankMismatchError: In the first step: the ranks were given different inputs.
        """
        guidance: Any = super()
        more = {} if kwargs is None else {"kwargs": kwargs}
        if get_parallel_state().pp.world_size == 1:
            single: Prediction = guidance.predict_noise_maybe_with_cfg(
                do_true_cfg,
                true_cfg_scale,
                positive_kwargs,
                negative_kwargs,
                cfg_normalize,
                output_slice,
                **more,
            )
            return single
        branches = [positive_kwargs]
        if do_true_cfg:
            if negative_kwargs is None:
                msg = "guidance needs the inputs of a negative branch; pass negative_kwargs"
                raise ParallelError(msg)
            branches.append(negative_kwargs)

        def combine(found: list[Prediction]) -> Prediction:
            own: Any = self
            both: Prediction = own.combine_cfg_noise(*found, true_cfg_scale, cfg_normalize, **more)
            return both

        return self._predicted(branches, output_slice, combine if do_true_cfg else _only)

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> Prediction | None:
        """As `predict_noise_maybe_with_cfg`, of any number of branches."""
        guidance: Any = super()
        own: Any = self
        if get_parallel_state().pp.world_size == 1:
            single: Prediction = guidance.predict_noise_with_multi_branch_cfg(
                do_true_cfg, true_cfg_scale, branches_kwargs, cfg_normalize, output_slice
            )
            return single
        if not branches_kwargs:
            msg = "guidance of no branch; pass the inputs of one branch or more"
            raise ParallelError(msg)

        def combine(found: list[Prediction]) -> Prediction:
            together: Prediction = own.combine_multi_branch_cfg_noise(
                found, true_cfg_scale, cfg_normalize
            )
            return together

        if not do_true_cfg:
            return self._predicted(branches_kwargs[:1], output_slice, _only)
        return self._predicted(branches_kwargs, output_slice, combine)

    def _predicted(
        self,
        branches: list[dict[str, Any]],
        output_slice: int | None,
        combine: Callable[[list[Prediction]], Prediction],
    ) -> Prediction | None:
        staged = _branches_of(self)
        found = staged.predict(branches, self.predict_noise, output_slice)
        if found is None:
            return None
        with staged.steps.telling():
            return combine(found)

    def predict_noise(self, *args: Any, **kwargs: Any) -> Any:
        """This stage's part of one branch.

        Args:
            *args: For ``self.transformer``.
            **kwargs: Likewise; over stages ``intermediate_tensors`` among them.

        Returns:
            On the last stage the first output of ``self.transformer``, as of the guidance mixin;
            on others what it returns, for the next one.
        """
        stages = get_parallel_state().pp
        if stages.rank_in_group < stages.world_size - 1:
            own: Any = self
            return own.transformer(*args, **kwargs)
        guidance: Any = super()
        return guidance.predict_noise(*args, **kwargs)

    # -- steps -----------------------------------------------------------------------------

    def scheduler_step_maybe_with_cfg(
        self,
        noise_pred: Any,
        t: Any,
        latents: Any,
        do_true_cfg: bool,
        per_request_scheduler: Any | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """The latents of the next step, which the last stage computes.

        Args:
            noise_pred: The prediction; ``None`` but on the last stage.
            t: The time of this step.
            latents: Of this step, of the same shapes on every stage.
            do_true_cfg: As of the guidance mixin.
            per_request_scheduler: In place of ``self.scheduler``.
            generator: For schedulers that draw random numbers.

        Returns:
            The latents on the last stage; `AsyncLatents` on those that get them; on others the
            ones that were given.

        Raises:
            Exception: On the last stage, what the scheduler fails with; others hear of it when they
                need the latents, or in the next step.
        """
        stages = get_parallel_state().pp
        guidance: Any = super()
        arguments = (do_true_cfg, per_request_scheduler, generator)
        if stages.world_size == 1:
            return guidance.scheduler_step_maybe_with_cfg(noise_pred, t, latents, *arguments)
        steps = _branches_of(self).steps
        stream = stream_name({"latents": latents})
        everyone = self.pp_latents_on == "all"
        if steps.is_last:
            with steps.telling(step=True):
                found = guidance.scheduler_step_maybe_with_cfg(noise_pred, t, latents, *arguments)
                steps.give(stream, found, everyone=everyone)
            return found
        taken = steps.take(stream if everyone or stages.rank_in_group == 0 else None)
        return latents if taken is None else taken


def _only(found: list[Prediction]) -> Prediction:
    return found[0]


def _branches_of(pipeline: PipelineParallelMixin) -> StagedBranches:
    """Of one pipeline and the current groups."""
    state = get_parallel_state()
    found = _branches.get(pipeline)
    if found is None or found.stages is not state.pp or found.columns is not state.cfg:
        number = next(_numbers.setdefault(state.pp, itertools.count()))
        seeds: Any = getattr(pipeline, "cfg_seeds", "error")
        found = StagedBranches(state.pp, state.cfg, f"pipeline {number}", seeds)
        _branches[pipeline] = found
    return found


# -- around methods of the pipeline ------------------------------------------------------------


def _guarding(pipeline: Any, call: Callable[[], Any]) -> Any:
    result = call()
    guard_decode(getattr(pipeline, "vae", None))
    return result


def _diffusing(pipeline: PipelineParallelMixin, call: Callable[[], Any]) -> Any:
    """A request: errors are told, what was announced arrives, and the result is real."""
    if id(pipeline) in _running.get() or get_parallel_state().pp.world_size == 1:
        return call()
    staged = _branches_of(pipeline)
    steps = staged.steps
    staged.begin()
    token = _running.set((*_running.get(), id(pipeline)))
    try:
        with steps.telling():
            result = call()
        steps.settle()
        return resolved(result)
    except Exception as error:
        steps.abandon(error)
        raise
    finally:
        _running.reset(token)
        steps.finish()
