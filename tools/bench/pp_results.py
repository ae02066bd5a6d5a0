"""What the benchmark of stages measured beside times, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from bench.arithmetic import Spread, pairwise_ratio
from bench.hsdp_results import Bar
from bench.pp_contestants import ALONE, OWN
from bench.pp_work import GUIDED
from bench.results import CaseResult, Measured

SHARE: Final = 0.85
"""Of its ideal, that every schedule is to reach."""
WEIGHTS: Final = 0.05
"""Of what is promised, by which the weights of a rank may differ."""
ERROR: Final = 1e-5
TWO_REQUESTS: Final = 1.7
_TWO: Final = "requests-2"
_PLAIN: Final = "plain"


@dataclass(frozen=True)
class StagedMeasured(Measured):
    """One contestant in one case; seconds are those of one image.

    Attributes:
        mode: What ``--modes`` calls it.
        work: What it made.
        ideal: Speed-up of its schedule if nothing costs anything.
        held: Bytes of weights, by rank.
        promised: Those that the partition promises.
        sent: Bytes of a step, by rank.
        expected: Those that arithmetic gives.
        patches: Into which PipeFusion cuts an image; 0: it is not used, and the image is exact.
        exact_share: Of the steps, those that PipeFusion computes exactly.
    """

    mode: str = ""
    work: str = GUIDED.name
    ideal: float = 1.0
    held: tuple[int, ...] = ()
    promised: tuple[int, ...] = ()
    sent: tuple[int, ...] = ()
    expected: tuple[float, ...] = ()
    patches: int = 0
    exact_share: float = 0.0

    @property
    def weights_off(self) -> float | None:
        """Largest difference of a rank from its promise, relative; None: nothing was promised."""
        pairs = zip(self.held, self.promised, strict=True)
        return max((abs(held / promised - 1) for held, promised in pairs), default=None)

    @property
    def bytes_fit(self) -> bool:
        """Whether every rank sends what arithmetic says."""
        return self.sent == self.expected


@dataclass(frozen=True)
class StagedResult(CaseResult):
    """All contestants in one case; times are those of one image."""

    def staged(self) -> list[StagedMeasured]:
        """The contestants."""
        return [each for each in self.measured if isinstance(each, StagedMeasured)]

    def own(self) -> list[StagedMeasured]:
        """Those of this repository's stages that could run."""
        return [each for each in self.staged() if each.side == OWN and each.seconds]

    def seconds_alone(self, work: str) -> tuple[float, ...]:
        """Of one process that does the same, by round; empty if it took no part."""
        if work == GUIDED.name:
            return self.single
        found = [m.seconds for m in self.staged() if m.side == ALONE and m.work == work]
        return found[0] if found else ()

    def speed_up(self, measured: Measured) -> Spread | None:
        """Over the single process that does the same work, within each round."""
        alone = self.seconds_alone(getattr(measured, "work", GUIDED.name))
        return pairwise_ratio(alone, measured.seconds) if alone and measured.seconds else None

    def share(self, measured: StagedMeasured) -> float | None:
        """Of its ideal, that a contestant reaches."""
        found = self.speed_up(measured)
        return None if found is None else found.median / measured.ideal

    def steady(self, measured: StagedMeasured) -> Spread | None:
        """Speed-up of the steps in patches alone, over the single process.

        The exact steps are taken to last as long as those of stages without anything to fill them.
        """
        plain = next((m.seconds for m in self.own() if m.mode == _PLAIN), ())
        alone, exact = self.seconds_alone(measured.work), measured.exact_share
        if not (measured.patches and plain and alone):
            return None
        patched = [
            (own - exact * one) / (1 - exact)
            for own, one in zip(measured.seconds, plain, strict=True)
        ]
        return pairwise_ratio(alone, tuple(patched))

    def ratios(self, measured: Measured) -> dict[str, Spread | None]:
        """Everything that is taken within each round, for the JSON."""
        found = super().ratios(measured)
        if isinstance(measured, StagedMeasured) and (speed_up := self.speed_up(measured)):
            ideal = measured.ideal
            parts = (speed_up.low, speed_up.median, speed_up.high)
            found["share_of_ideal"] = Spread(*(part / ideal for part in parts))
        return found

    def bars(self) -> list[Bar]:
        """What is asked of stages."""
        return [*self._shares(), *self._two_requests(), *self._patches(), *self._exact()]

    def _shares(self) -> Iterator[Bar]:
        shares = {each.mode: self.share(each) for each in self.own() if not each.patches}
        known = {mode: share for mode, share in shares.items() if share is not None}
        if known:
            worst = min(known, key=lambda mode: known[mode])
            what = f"every schedule reaches {SHARE:.0%} of its ideal; the worst, {worst}"
            yield Bar(what, f"{known[worst]:.0%}", known[worst] >= SHARE)

    def _two_requests(self) -> Iterator[Bar]:
        for each in self.own():
            if each.mode == _TWO and (found := self.speed_up(each)):
                what = f"two guided images at once are made {TWO_REQUESTS} × as fast"
                yield Bar(what, f"{found.median:.2f} ×", found.median >= TWO_REQUESTS)

    def _patches(self) -> Iterator[Bar]:
        found = {each.mode: self.steady(each) for each in self.own() if each.patches}
        speeds = {mode: speed.median for mode, speed in found.items() if speed is not None}
        if speeds:
            best = max(speeds, key=lambda mode: speeds[mode])
            share = speeds[best] / self.ranks
            all_of_them = ", ".join(f"{mode} {speed:.2f} ×" for mode, speed in speeds.items())
            what = f"steps in patches reach {SHARE:.0%} of the ranks' speed; the best, {best}"
            yield Bar(what, f"{share:.0%} ({all_of_them})", share >= SHARE)

    def _exact(self) -> Iterator[Bar]:
        off = [each.weights_off for each in self.own() if each.weights_off is not None]
        if off:
            what = f"weights of each rank are within {WEIGHTS:.0%} of what the partition promises"
            yield Bar(what, f"{max(off):.1%} off", max(off) <= WEIGHTS)
        wrong = [each.mode for each in self.own() if not each.bytes_fit]
        if self.own():
            what = "each rank sends the bytes that arithmetic gives"
            yield Bar(what, f"not: {', '.join(wrong)}" if wrong else "all do", not wrong)
        exact = [each for each in self.own() if not each.patches]
        errors = [each.error for each in exact if each.error is not None]
        if errors:
            what = f"images are those of one process within {ERROR:g}"
            yield Bar(what, f"{max(errors):.0e}", max(errors) <= ERROR)
