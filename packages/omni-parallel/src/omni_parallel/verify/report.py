"""What a user attaches to an issue: parity, time and memory, and what was run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from omni_parallel.pipeline_request import PipelineRequest
from omni_parallel.verify.rank import VerifiedRank

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of a pixel in [0, 1] that counts as the same, by dtype.

In halved precision a sum that is cut otherwise rounds otherwise, too."""


@dataclass(frozen=True)
class Verified:
    """One process beside the ranks of a layout."""

    request: PipelineRequest
    layout: str
    exact: bool
    """Whether the layout promises the result of one process."""
    single: VerifiedRank
    ranks: tuple[VerifiedRank, ...]
    identical: bool
    """Whether every rank has it bit for bit."""
    largest: float
    """Largest difference on any rank."""
    psnr: float
    """In dB, of the rank that is farthest; infinite where all are equal, and minus that for NaN."""

    @classmethod
    def of(
        cls,
        request: PipelineRequest,
        layout: tuple[str, bool],
        single: tuple[VerifiedRank, Tensor],
        ranks: list[tuple[VerifiedRank, Tensor]],
    ) -> Verified:
        """Compare what was made.

        Args:
            request: What was asked for.
            layout: Its short form, and whether it promises to be exact.
            single: What one process measured, and its result.
            ranks: The same of every rank.
        """
        reference = single[1].double()
        errors = [found.double() - reference for _, found in ranks]
        largest = max(_of_all(error.abs().max()) for error in errors)
        mean = max(_of_all(error.square().mean()) for error in errors)
        peak = max(1.0, float(reference.max() - reference.min()))
        broken = math.inf if mean == 0 else -math.inf  # of results that are equal, or no numbers
        psnr = 10 * math.log10(peak**2 / mean) if 0 < mean < math.inf else broken
        same = all(torch.equal(found, single[1]) for _, found in ranks)
        measured = tuple(rank for rank, _ in ranks)
        return cls(request, layout[0], layout[1], single[0], measured, same, largest, psnr)

    @property
    def passed(self) -> bool:
        """Whether the result is the same, as far as the layout promises."""
        return not self.exact or self.largest <= TOLERANCE[self.request.dtype]

    @property
    def speed_up(self) -> float:
        """Over one process, of the slowest rank."""
        return self.single.seconds / max(rank.seconds for rank in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, of which JSON can be made: what is infinite is None."""
        found = asdict(self)
        for name in ("psnr", "largest"):
            found[name] = found[name] if math.isfinite(found[name]) else None
        measured = found.pop("ranks")
        return {**found, "ranks": len(measured), "measured": measured, "speed_up": self.speed_up}

    def table(self) -> Table:
        """One process and the slowest or largest of the ranks, side by side."""
        table = Table("", "1 process", self.layout)
        for column in table.columns[1:]:
            column.justify = "right"
        slowest = max(rank.seconds for rank in self.ranks)
        table.add_row("seconds", f"{self.single.seconds:.2f}", f"{slowest:.2f}")
        table.add_row("speed-up", "", f"{self.speed_up:.2f} x")
        for name, key in (("peak memory", "peak_bytes"), ("weights", "weight_bytes")):
            most = max(getattr(rank, key) for rank in self.ranks)
            table.add_row(name, _megabytes(getattr(self.single, key)), _megabytes(most))
        table.add_row("largest difference", "", f"{self.largest:.1e}")
        table.add_row("PSNR", "", f"{self.psnr:.1f} dB")
        table.add_row("bit-identical", "", "yes" if self.identical else "no")
        return table

    def verdict(self) -> str:
        """Whether the result is that of one process, in words."""
        if not self.exact:
            return f"{self.layout} approximates: PSNR {self.psnr:.1f} dB"
        allowed = TOLERANCE[self.request.dtype]
        said = "the same result" if self.passed else "ANOTHER RESULT"
        limit = f"tolerance {allowed:g} in {self.request.dtype}"
        return f"{said}: largest difference {self.largest:.1e}, {limit}"


def _of_all(value: Tensor) -> float:
    """A number; NaN counts as infinitely wrong, which max() would pass over."""
    found = float(value)
    return math.inf if math.isnan(found) else found


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
