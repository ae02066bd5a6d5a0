"""Sequence parallelism as a strategy that the umbrella package can find."""

from __future__ import annotations

from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import Handle, ParallelState
from omni_parallel_state.strategy_options import config_with
from omni_sp.hooks import apply_sequence_parallel
from omni_sp.sp_config import SequenceParallelConfig


class SequenceParallelStrategy:
    """Applies sequence parallelism with the degrees of a state's layout."""

    name = "sp"

    def apply(self, target: Any, state: ParallelState, **options: Any) -> Handle:
        """Split the sequence of a transformer, or of the one in a pipeline.

        Args:
            target: The module or pipeline.
            state: The ranks; its layout has the degrees.
            options: Other fields of `SequenceParallelConfig`.

        Raises:
            ParallelConfigError: The target is no module and has none named ``transformer``, or an
                option is none.
        """
        module = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
        if not isinstance(module, nn.Module):
            msg = (
                f"{type(target).__name__} is neither a module nor a pipeline with a transformer; "
                "pass the module whose sequence is to be split"
            )
            raise ParallelConfigError(msg)
        layout = state.layout
        degrees = {"ulysses_degree": layout.ulysses, "ring_degree": layout.ring}
        config = config_with(SequenceParallelConfig, options, **degrees)
        return apply_sequence_parallel(module, config, state=state)


strategy = SequenceParallelStrategy()
"""The object that the entry point ``omni_parallel.v1.strategies: sp`` names."""
