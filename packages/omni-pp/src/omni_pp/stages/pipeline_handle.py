"""What `apply_pipeline_parallel` gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import Handle
from omni_pp.partition import PartitionedModel
from omni_pp.stages.request_turns import RequestTurns


class PipelineHandle(Handle):
    """Undoes the stages of a pipeline, and runs several of its requests together.

    Args:
        undo: Called once, by the first `remove`.
        pipeline: The pipeline, or a denoiser.
        turns: Whose turn it is.
        partitions: The models that were cut, by name; empty on one rank.
        check: Raises what `remove` is to raise before anything is undone.

    Attributes:
        partitions: As given.
    """

    def __init__(
        self,
        undo: Callable[[], None],
        pipeline: Any,
        turns: RequestTurns,
        partitions: Mapping[str, PartitionedModel],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(undo)
        self._pipeline = ref(pipeline)
        self._turns = turns
        self.partitions = partitions
        self._check = check

    def remove(self) -> None:
        """Give the pipeline back as it was; a second call does nothing.

        Raises:
            ParallelError: Ranks share the weights of stages; nothing was undone.
        """
        if not self.removed:
            self._check()
        super().remove()

    def run_together(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Call the pipeline once for each request, so that they advance beside each other.

        While one request waits for its prediction, the stages work on another: as many requests as
        there are stages keep all of them busy. Each has a scheduler of its own, and the result that
        it would have alone; pass a generator with each, for torch's own random numbers are drawn
        in another order.

        Args:
            requests: Named arguments of each call; alike on every rank.

        Returns:
            What the pipeline returns for each.

        Raises:
            ParallelConfigError: The handle was removed, or is one of a denoiser alone.
            Exception: What the first request that failed ended with; the others are broken off.
        """
        pipeline = self._pipeline()
        if self.removed or pipeline is None:
            msg = "run_together was called after remove(); apply the stages again"
            raise ParallelConfigError(msg)
        if not hasattr(pipeline, "scheduler"):
            msg = (
                f"run_together calls a pipeline, and the stages were applied to a "
                f"{type(pipeline).__name__}, which has no scheduler; apply them to the pipeline"
            )
            raise ParallelConfigError(msg)
        return self._turns.run(pipeline, requests)
