"""The contestants of whole pipelines: layouts of this product, and diffusers' own parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from bench.contestants import Contestant, Named
from omni_parallel import parallelize

RANKS: Final = 2


@dataclass(frozen=True)
class WholeContestant(Named):
    """One way to share a pipeline's work.

    Attributes:
        side: Whose it is.
        mode: What ``--modes`` calls it.
        layout: Of this product.
        split: Of diffusers.
    """

    side: str
    mode: str
    layout: str | None = None
    split: Contestant | None = None

    def apply(self, pipeline: Any) -> Callable[[], None]:
        """Make a pipeline parallel in place, on every rank.

        Returns:
            Takes that back, as far as it can.
        """
        if self.split is not None:
            return self.split.apply(pipeline.transformer)
        return parallelize(pipeline, self.layout, device="cpu").remove


def whole_contestants() -> list[WholeContestant]:
    """Every contestant."""
    return [
        WholeContestant("omni-parallel", "auto", "auto"),
        WholeContestant("omni-parallel", "cfg", f"cfg={RANKS},vae_patch={RANKS}"),
        WholeContestant("omni-parallel", "ulysses", f"ulysses={RANKS},vae_patch={RANKS}"),
        WholeContestant(
            "diffusers", "ulysses", split=Contestant("diffusers", "ulysses", ulysses=RANKS)
        ),
        WholeContestant("diffusers", "ring", split=Contestant("diffusers", "ring", ring=RANKS)),
    ]
