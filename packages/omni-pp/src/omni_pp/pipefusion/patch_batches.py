"""Cutting calls into patches, after the steps that are exact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, split_sizes
from omni_pp.pipefusion.kv_cache import KeyValueCache
from omni_pp.pipefusion.patch_results import hand_out
from omni_pp.pipefusion.patch_values import Ledger
from omni_pp.pipefusion.patch_view import PatchedCall, PatchView
from omni_pp.pipefusion.patched_denoiser import PatchedDenoiser
from omni_pp.pipefusion.patchwise import PatchwiseTensor, real_all, values_of
from omni_pp.pipefusion.pipefusion_config import PipeFusionConfig
from omni_pp.pipefusion.request_clock import RequestClock
from omni_pp.pipefusion.token_layout import TokenLayout
from omni_pp.pipefusion.token_shares import TokenShares, share_bounds
from omni_pp.stages.micro_batches import Division, MicroBatches
from omni_pp.stages.staged_denoiser import Piece, StagedDenoiser


class PatchBatches(MicroBatches):
    """Cuts calls along their image tokens; a batch stays whole.

    A branch is the position of a call among those of its denoiser in a step. Its first steps of a
    request are exact, and so is a step that differs in shapes from the one before, or before which
    it was left out: the keys of the step before are not there, then.

    Args:
        config: How calls are cut.
        clock: Tells the steps of a request.
        group: Ranks of one stage that share the tokens of a patch.

    Attributes:
        denoisers: Those that are cut, by name.
        ledger: What is still to be computed of results.
    """

    def __init__(
        self, config: PipeFusionConfig, clock: RequestClock, group: GroupCoordinator
    ) -> None:
        super().__init__(1, ())
        self._config = config
        self._clock = clock
        self._group = group if group.world_size > 1 else None
        self._caches: dict[tuple[str, int], KeyValueCache] = {}
        self._request = -1
        self.ledger = Ledger()
        self.denoisers: dict[str, PatchedDenoiser] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values that this rank holds."""
        return sum(cache.nbytes for cache in self._caches.values())

    def drop(self) -> None:
        """Give up all keys and values."""
        self._caches.clear()

    def cut(
        self, denoiser: StagedDenoiser, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Division:
        """How a call is cut.

        Raises:
            ParallelConfigError: It has fewer image tokens than patches, or an argument that cannot
                be cut.
        """
        division = super().cut(denoiser, args, kwargs)
        whole, patched = division.whole, self.denoisers[denoiser.name]
        tokens, text = patched.count(args, kwargs)
        ranks = 1 if self._group is None else self._group.world_size
        if tokens < self._config.patches * ranks:
            msg = (
                f"a call of {denoiser.name} has {tokens} image tokens, which cannot be cut into "
                f"patches={self._config.patches}{f' for {ranks} ranks each' * (ranks > 1)}; legal "
                f"here: 1 to {tokens // ranks}"
            )
            raise ParallelConfigError(msg)
        if self._config.patches == 1 and ranks == 1:
            return division
        cache = self._cache(denoiser.name, whole.stream)
        if cache.steps < self._config.warmup_steps or self._config.patches == 1:
            cache.steps += 1
            whole.args, whole.kwargs = real_all(args), real_all(dict(kwargs))
            call = PatchedCall(tokens, text, cache)
            whole.around = partial(patched.around, self._view(call, 0, tokens))
            return division
        bounds = (0, *accumulate(split_sizes(tokens, self._config.patches)))
        layout = patched.layout(args, kwargs, self.likes.get(whole.stream), bounds)
        whole.args, whole.kwargs = self._arriving(patched, layout, args, kwargs)
        call = PatchedCall(tokens, text, cache, layout)
        views = [self._view(call, *span, i) for i, span in enumerate(pairwise(bounds))]
        division = Division(
            whole, [self._patch(whole, patched, view) for view in views], [], None, known=True
        )
        if layout is not None:
            plain = self.likes[whole.stream]
            division.hand_out = partial(hand_out, self.ledger, layout, plain, division.pieces)
        return division

    def _view(self, call: PatchedCall, start: int, stop: int, index: int = 0) -> PatchView:
        ranks = 1 if self._group is None else self._group.world_size
        bounds = share_bounds(start, stop, 0 if start else call.text, ranks)
        return PatchView(call, TokenShares(bounds, self._group), index)

    @staticmethod
    def _arriving(
        patched: PatchedDenoiser,
        layout: TokenLayout | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, of which what is denoised may still arrive patch by patch."""
        if layout is None:
            return real_all(args), real_all(dict(kwargs))
        denoised = patched.named(args, kwargs).get(patched.plan.tokens.argument)
        values = values_of(denoised) if isinstance(denoised, PatchwiseTensor) else None
        if values is None or values.layout != layout:
            return real_all(args), real_all(dict(kwargs))
        return (
            tuple(one if one is denoised else real_all(one) for one in args),
            {name: one if one is denoised else real_all(one) for name, one in kwargs.items()},
        )

    @staticmethod
    def _patch(whole: Piece, patched: PatchedDenoiser, view: PatchView) -> Piece:
        place = "first " * view.is_first + "last " * view.is_last
        stream = f"{whole.stream} {place}patch of {view.length}"
        return Piece(
            whole.args,
            whole.kwargs,
            stream,
            around=partial(patched.around, view),
            is_partial=not view.is_last,
        )

    def _cache(self, name: str, kind: str) -> KeyValueCache:
        """That of a call's branch, as far as it is of the step before."""
        if self._request != self._clock.request:
            self._request = self._clock.request
            self._caches.clear()
        step, branch = self._clock.step, self._clock.branch(name)
        found = self._caches.get((name, branch))
        if found is None or found.kind != kind:
            found = self._caches[name, branch] = KeyValueCache(kind)
        elif step > 0 and found.last != step - 1:
            found.steps = 0
        found.last = step
        return found
