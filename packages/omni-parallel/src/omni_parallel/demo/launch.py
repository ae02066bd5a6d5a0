"""Start the ranks of a run, follow them, and end every one of them whatever happens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf, log10
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_parallel.demo.generate import PROGRESS, RankReport, run_rank
from omni_parallel.demo.request import DemoRequest
from omni_parallel.launching.failures import rank_failure
from omni_parallel.launching.looking import looking
from omni_parallel.launching.processes import run_processes
from omni_parallel.v1 import ParallelConfig


@dataclass(frozen=True)
class RunResult:
    """What a run made and measured."""

    config: ParallelConfig
    reports: tuple[RankReport, ...]
    """By rank."""
    pictures: tuple[Tensor, ...]
    """By rank: float32 of shape ``(pictures, 3, height, width)`` in [0, 1]."""

    @property
    def ranks(self) -> int:
        """How many there were."""
        return len(self.reports)

    @property
    def seconds_per_step(self) -> float:
        """Of the slowest rank."""
        return max(report.seconds_per_step for report in self.reports)

    @property
    def bytes_per_step(self) -> float:
        """Of the rank that sends most."""
        return max(report.bytes_per_step for report in self.reports)

    @property
    def peak_bytes(self) -> int:
        """Of the rank that needs most."""
        return max(report.peak_bytes for report in self.reports)

    @property
    def weight_bytes(self) -> int:
        """Parameters of the rank that holds most."""
        return max(report.weight_bytes for report in self.reports)

    def difference(self, other: RunResult) -> float:
        """Largest difference of any pixel on any rank from the first rank of another run."""
        # torch's max and not Python's, which may pass over a NaN.
        return (torch.stack(self.pictures) - other.pictures[0]).abs().max().item()

    def worst_psnr(self, other: RunResult) -> float:
        """As `difference`, of whole pictures, in dB; infinite where they are equal.

        Of the picture that is farthest from the other run's.
        """
        error = (torch.stack(self.pictures) - other.pictures[0]).double()
        mean = error.square().mean(dim=(2, 3, 4)).max().item()
        return -10 * log10(mean) if mean else inf


def launch(
    request: DemoRequest,
    config: ParallelConfig,
    ranks: int,
    on_step: Callable[[int], None],
    device: str | None = None,
) -> RunResult:
    """Run the demonstration on several ranks, with torch's elastic agent.

    Args:
        request: What to generate.
        config: What the ranks share.
        ranks: How many.
        on_step: Called from another thread with the number of steps done.
        device: Type of device; default: an accelerator for each rank, if there is one.

    Raises:
        RankFailedError: A rank failed; the message holds what it said.
        KeyboardInterrupt: The run was interrupted; every rank has ended.
    """
    with tempfile.TemporaryDirectory(prefix="omni-parallel-") as folder:
        with looking(partial(_tell, Path(folder) / PROGRESS, on_step)):
            try:
                args = (request, config, folder, device)
                reports = run_processes(run_rank, args, ranks, folder)
            except ChildFailedError as error:
                raise rank_failure(error) from None
        pictures = tuple(
            torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)
        )
    return RunResult(config, tuple(reports[rank] for rank in sorted(reports)), pictures)


def _tell(progress: Path, on_step: Callable[[int], None]) -> None:
    """Read rank 0's progress."""
    # Else there is no step yet, or the number is being written.
    with suppress(FileNotFoundError, json.JSONDecodeError):
        on_step(json.loads(progress.read_text()))
