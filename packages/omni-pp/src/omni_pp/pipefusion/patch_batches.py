"""Cutting calls into patches, after the steps that are exact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from omni_group_coordinator import ParallelConfigError, split_sizes
from omni_pp.pipefusion.kv_cache import KeyValueCache
from omni_pp.pipefusion.patch_view import PatchedCall, PatchView
from omni_pp.pipefusion.patched_denoiser import PatchedDenoiser
from omni_pp.pipefusion.pipefusion_config import PipeFusionConfig
from omni_pp.pipefusion.request_clock import RequestClock
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

    Attributes:
        denoisers: Those that are cut, by name.
    """

    def __init__(self, config: PipeFusionConfig, clock: RequestClock) -> None:
        super().__init__(1, ())
        self._config = config
        self._clock = clock
        self._caches: dict[tuple[str, int], KeyValueCache] = {}
        self._request = -1
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
        tokens = patched.count(args, kwargs)
        if tokens < self._config.patches:
            msg = (
                f"a call of {denoiser.name} has {tokens} image tokens, which cannot be cut into "
                f"patches={self._config.patches}; legal here: 1 to {tokens}"
            )
            raise ParallelConfigError(msg)
        if self._config.patches == 1:
            return division
        cache = self._cache(denoiser.name, whole.stream)
        call = PatchedCall(tokens, cache)
        if cache.steps < self._config.warmup_steps:
            cache.steps += 1
            whole.around = partial(patched.around, PatchView(call, 0, tokens))
            return division
        bounds = [0, *accumulate(split_sizes(tokens, self._config.patches))]
        pieces = [self._patch(whole, patched, PatchView(call, *span)) for span in pairwise(bounds)]
        return Division(whole, pieces, [], None, known=True)

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
