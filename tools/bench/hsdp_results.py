"""What the benchmark of sharded weights measured beside times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bench.arithmetic import Spread, pairwise_ratio
from bench.results import CaseResult, Measured

PLAIN: Final = "fully_shard"
OWN: Final = "omni-hsdp"
ONCE: Final = "gathered"
AHEAD: Final = "prefetch-1"
ROOM: Final = 2  # blocks, beside a rank's share, while it loads
ONCE_LIMIT: Final = 1.05
EVEN: Final = 0.995  # what rounds to 1.00


@dataclass(frozen=True)
class Peaks:
    """The most that a process held, beyond what it held before, in bytes.

    Attributes:
        anonymous: In no file; sampled every millisecond.
        resident: All, with the pages of mapped files, which the system can take back; by the
            kernel's own mark of the highest.
    """

    anonymous: int
    resident: int


@dataclass(frozen=True)
class Memory:
    """One contestant in a fresh process, on the rank that had most."""

    loading: Peaks
    running: Peaks


@dataclass(frozen=True)
class ShardedMeasured(Measured):
    """One contestant in one case.

    Attributes:
        mode: What ``--modes`` calls it.
        memory: Of one rank; ``None`` if it could not run.
    """

    mode: str = ""
    memory: Memory | None = None


@dataclass(frozen=True)
class Bar:
    """What is asked of a contestant, and whether it is met."""

    what: str
    found: str
    met: bool


@dataclass(frozen=True)
class ShardedResult(CaseResult):
    """All contestants on one number of ranks.

    Attributes:
        model: Bytes of the weights.
        block: Bytes of the largest block.
        forwards: In each timed turn.
    """

    model: int = 0
    block: int = 0
    forwards: int = 1

    def find(self, side: str, mode: str) -> ShardedMeasured | None:
        """A contestant that was measured."""
        for each in self.measured:
            if isinstance(each, ShardedMeasured) and (each.side, each.mode) == (side, mode):
                return each
        return None

    def against_whole(self, measured: Measured) -> Spread | None:
        """How many times the time of the whole model on every rank, within each round."""
        return pairwise_ratio(measured.seconds, self.together) if measured.seconds else None

    def ratios(self, measured: Measured) -> dict[str, Spread | None]:
        """Everything that is taken within each round, for the JSON."""
        return {**super().ratios(measured), "against_whole": self.against_whole(measured)}

    def bars(self) -> list[Bar]:
        """What is asked of weights that several ranks share."""
        found = [*self._loading(), *self._once(), *self._ahead()]
        errors = [m.error for m in self.measured if m.side == OWN and m.error is not None]
        if errors:
            worst = max(errors)
            found.append(Bar("outputs are those of the whole model", f"{worst:g}", worst == 0))
        return found

    def _loading(self) -> list[Bar]:
        limit = self.model / self.ranks + ROOM * self.block
        own = [m for m in self.measured if isinstance(m, ShardedMeasured) and m.side == OWN]
        peaks = [m.memory.loading.resident for m in own if m.memory is not None]
        if not peaks or self.ranks == 1:
            return []
        what = f"loading takes at most a share and {ROOM} blocks, {limit / 1e6:.0f} MB"
        return [Bar(what, f"{max(peaks) / 1e6:.0f} MB", max(peaks) <= limit)]

    def _once(self) -> list[Bar]:
        once = self.find(OWN, ONCE)
        ratio = None if once is None else self.against_whole(once)
        if ratio is None:
            return []
        what = f"gathered once, a later step takes at most {ONCE_LIMIT} × the whole model's time"
        return [Bar(what, f"{ratio.median:.3f} ×", ratio.median <= ONCE_LIMIT)]

    def _ahead(self) -> list[Bar]:
        ahead, plain = self.find(OWN, AHEAD), self.find(PLAIN, "defaults")
        if not (ahead and plain and ahead.seconds and plain.seconds):
            return []
        ratio = pairwise_ratio(plain.seconds, ahead.seconds)
        what = "one block ahead is no slower than plain fully_shard"
        return [Bar(what, f"{ratio.median:.2f} × as fast", ratio.median >= EVEN)]
