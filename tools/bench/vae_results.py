"""What the benchmark of autoencoders measured beside times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bench.arithmetic import Spread, pairwise_ratio
from bench.results import CaseResult, Measured

FLOOR: Final = "floor"


@dataclass(frozen=True)
class Sent:
    """What one rank sends in one decode, for one purpose or for all."""

    bytes: int
    calls: int


@dataclass(frozen=True)
class DecodeTraffic:
    """What the busiest rank sends in one decode.

    Attributes:
        halos: Rows that convolutions reach for beyond a shard.
        formula: What arithmetic on the shapes of the whole decode says of their bytes.
        norms: Statistics of group norms.
        attention: Keys and values.
        result: What comes after the decoder, or is its output: parts of the sample, or tiles.
    """

    halos: Sent
    formula: int
    norms: Sent
    attention: Sent
    result: Sent


@dataclass(frozen=True)
class DecodeMeasured(Measured):
    """One contestant in one case.

    Attributes:
        mode: The side that it splits, or how else it decodes.
        memory: Peak bytes of a rank; see `bench.vae_counts.LiveBytes`.
        psnr: Against the whole decode, in dB, with the range of its values as peak; ``None`` if
            both are equal.
        sent: Of this repository's contestants, by purpose.
        wire: What torch.distributed was given to send; of every contestant on several ranks.
    """

    mode: str = ""
    memory: int | None = None
    psnr: float | None = None
    sent: DecodeTraffic | None = None
    wire: Sent | None = None


@dataclass(frozen=True)
class DecodeResult(CaseResult):
    """All contestants in one case.

    Attributes:
        memory: Peak bytes of the single process.
        reaching: Calls of convolutions whose kernel is larger than one row and one column.
        remark: What else there is to say.
    """

    memory: int = 1
    reaching: int = 0
    remark: str = ""

    def share_of_floor(self, measured: Measured) -> Spread | None:
        """The floor's time over the contestant's, within each round; the floor is its own side's.

        Contestants that split no side are compared with the floor that is faster.
        """
        if not isinstance(measured, DecodeMeasured):
            return None
        decoded = [m for m in self.measured if isinstance(m, DecodeMeasured)]
        floors = [m for m in decoded if m.side == FLOOR and "+" not in m.mode and m.seconds]
        if measured in floors:
            return None
        own = [m for m in floors if m.mode == measured.mode.partition("+")[0]] or floors
        if not own or not measured.seconds:
            return None
        best = max(own, key=lambda m: pairwise_ratio(self.single, m.seconds).median)
        return pairwise_ratio(best.seconds, measured.seconds)

    def ratios(self, measured: Measured) -> dict[str, Spread | None]:
        """Everything that is taken within each round, for the JSON."""
        return {**super().ratios(measured), "share_of_floor": self.share_of_floor(measured)}
