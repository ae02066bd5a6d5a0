"""One strategy on the ranks that started this: ``run_strategy.py omni_sp``.

Compares its picture with that of one process, and sees that a rank had less to do. Needs what the
strategy's wheel declares and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from toy_pipeline import Pipeline

from omni_parallel_state import (
    ParallelLayout,
    ParallelState,
    destroy_distributed_environment,
    init_distributed_environment,
)

# For each package, the degree that ranks are, and what each of them has less of.
TRIALS = {
    "omni_sp": ("ulysses", "tokens"),
    "omni_cfgp": ("cfg", "tokens"),
    "omni_pp": ("pp", "weights"),
    "omni_hsdp": ("fs", "weights"),
    "omni_vae_patch": ("vae", "pixels"),
}


def compare(
    package: str, pipeline: Pipeline, apply: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Draw alone, on all ranks, and alone again.

    Raises:
        AssertionError: The picture is another one, or a rank had as much to do as one process.
    """
    less = TRIALS[package][1]
    alone, work = pipeline(), pipeline.done[less]
    with apply():
        torch.testing.assert_close(pipeline(), alone, rtol=1e-5, atol=1e-5)
        share = pipeline.done[less] / work
    if share > 0.75:
        msg = f"{package}: a rank had {share:.0%} of the {less} of one process"
        raise AssertionError(msg)
    torch.testing.assert_close(pipeline(), alone, rtol=0, atol=0)


def planned(pipeline: Pipeline) -> Pipeline:
    """Say how the tokens of the toy are split and joined; diffusers' classes are known."""
    from omni_sp import SequenceParallelInput, SequenceParallelOutput

    transformer: Any = pipeline.transformer
    tokens = SequenceParallelInput(1, expected_dims=3, attends=True)
    output = SequenceParallelOutput(1, expected_dims=3)
    transformer._sp_plan = {"blocks.0": {"tokens": tokens}, "head": output}
    return pipeline


def main(package: str) -> None:
    """Try the strategy of a package."""
    init_distributed_environment(backend="gloo", timeout=timedelta(seconds=60))
    degrees: dict[str, Any] = {TRIALS[package][0]: dist.get_world_size()}
    state = ParallelState(ParallelLayout(**degrees))
    pipeline = Pipeline() if package != "omni_sp" else planned(Pipeline())
    with state.use():
        compare(package, pipeline, lambda: import_module(package).strategy.apply(pipeline, state))
    state.destroy()
    destroy_distributed_environment()


if __name__ == "__main__":
    main(sys.argv[1])
