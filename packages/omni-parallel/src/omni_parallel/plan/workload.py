"""What a pipeline has to do for one image or video, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omni_parallel.plan.recorded_call import Attended, Block, Recorded


@dataclass(frozen=True)
class Workload:
    """The work of one request, on one process."""

    denoiser: Recorded
    """One call, for one branch of guidance."""
    decode: Recorded | None
    """Of the autoencoder; None: it is none, or its work is not known."""
    branches: int
    """Predictions of a step."""
    batched: bool
    """Whether the pipeline asks for the branches in one call, as rows of a batch."""
    steps: int
    text: int
    """Tokens of the prompt."""
    element: int
    """Bytes of a number."""
    denoisers: int = 1
    """Models that take turns over the steps, as the two of Wan 2.2: weights of each are held."""
    weights: Mapping[str, int] | None = None
    """Bytes of the other components, by name."""

    @property
    def prediction_bytes(self) -> int:
        """Of what one branch predicts."""
        return self.denoiser.output_bytes

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence that attends to itself."""
        return max((one.queries for part in self.parts for one in self.shared(part)), default=0)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks, and what is in none."""
        return (*self.denoiser.blocks, self.denoiser.outside)

    def shared(self, part: Block) -> list[Attended]:
        """The attention of tokens to themselves, which crosses the ranks of a sequence.

        In blocks that is every call with as many queries as keys. What is in none may also be a
        part of its own for the text, which every rank computes.
        """
        least = 0 if part is not self.denoiser.outside else self.text + 1
        return [one for one in part.attended if one.queries == one.keys and one.queries >= least]
