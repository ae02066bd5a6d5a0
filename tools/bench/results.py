"""What a benchmark measured, and how it is written as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.arithmetic import Spread, ceiling, pairwise_ratio

SINGLE: Final = "single process"
TOGETHER: Final = "every rank alone at once"


@dataclass(frozen=True)
class Traffic:
    """What one layer or step sends, as one rank counted it.

    Attributes:
        bytes_sent: Bytes to the peers, of the rank that sends most.
        formula: What arithmetic says of them.
        calls: Operations, by name.
        once: Operations beside them that come once, however many layers or steps there are.
        once_bytes: Their bytes.
    """

    bytes_sent: int
    formula: float
    calls: dict[str, int]
    once: dict[str, int] = field(default_factory=dict)
    once_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """One contestant in one case.

    Attributes:
        name: Its name.
        side: Whose it is.
        seconds: By round, of the slowest rank; empty if it could not run.
        error: Largest difference from the single process, relative to its largest value.
        traffic: What one layer or step sends, where the contestant counts it.
        problem: Why it could not run, or what else there is to say.
    """

    name: str
    side: str
    seconds: tuple[float, ...] = ()
    error: float | None = None
    traffic: Traffic | None = None
    problem: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """All contestants in one case.

    Attributes:
        case: What was run, as text.
        ranks: How many.
        rival: The side that the others are compared with.
        single: Seconds by round of rank 0 alone.
        together: Seconds by round of every rank doing the whole work.
        measured: The contestants.
        core_share: Share of a core that each rank had when all did the whole work; below 1 other
            work on the machine disturbed the numbers.
        baseline: What rank 0 does alone, for tables.
        timed: What takes the seconds, if not the whole work.
        counted: What traffic is counted for.
    """

    case: str
    ranks: int
    rival: str
    single: tuple[float, ...]
    together: tuple[float, ...]
    measured: tuple[Measured, ...]
    core_share: float = 1.0
    baseline: str = SINGLE
    timed: str = ""
    counted: str = "layer"

    @property
    def ceiling(self) -> float:
        """The speed-up that this machine allows."""
        return ceiling(self.single, self.together, self.ranks)

    def speed_up(self, measured: Measured) -> Spread | None:
        """Over the single process, within each round."""
        return pairwise_ratio(self.single, measured.seconds) if measured.seconds else None

    def best_rival(self) -> Measured | None:
        """The rival's contestant with the best speed-up."""
        able = [m for m in self.measured if m.side == self.rival and m.seconds]
        return max(able, key=lambda m: pairwise_ratio(self.single, m.seconds).median, default=None)

    def against_rival(self, measured: Measured) -> Spread | None:
        """How many times as fast as the rival's best one, within each round."""
        best = self.best_rival()
        if best is None or not measured.seconds:
            return None
        return pairwise_ratio(best.seconds, measured.seconds)

    def ratios(self, measured: Measured) -> dict[str, Spread | None]:
        """Everything that is taken within each round, for the JSON."""
        return {
            "speed_up": self.speed_up(measured),
            "against_rival": self.against_rival(measured),
        }


@dataclass(frozen=True)
class HostCost:
    """What the host does for one contestant, with a backend that sends nothing.

    Per attention layer, and beyond what the single process does for the layer.

    Attributes:
        name: The contestant.
        microseconds: On the CPU with a handful of tokens.
        meta_microseconds: On the meta device, where torch works out shapes in Python.
        kernels: Operators that compute or copy.
        collectives: Operators that communicate.
        problem: Why it could not run.
    """

    name: str
    microseconds: float | None = None
    meta_microseconds: float | None = None
    kernels: float | None = None
    collectives: dict[str, int] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class HostResult:
    """Host costs of all contestants on one model.

    Attributes:
        model: The model, as text.
        ranks: Ranks that the backend pretends.
        layer_microseconds: Of a layer in the single process, on the CPU.
        layer_kernels: Likewise.
        costs: The contestants.
        alone_microseconds: Per forward at world size 1, of hooks that have nothing to do.
        alone_share: The same over a forward of 320 tokens.
    """

    model: str
    ranks: int
    layer_microseconds: float
    layer_kernels: float
    costs: tuple[HostCost, ...]
    alone_microseconds: float | None = None
    alone_share: float | None = None


@dataclass
class Report:
    """Everything that one run of a benchmark measured."""

    benchmark: str
    cases: list[CaseResult] = field(default_factory=list)
    host: list[HostResult] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Cases whose ranks failed, and how."""

    def write(self, path: Path) -> None:
        """Write everything as JSON, each time in one piece."""
        text = json.dumps(self.as_json(), indent=1)
        part = path.with_name(path.name + ".part")
        part.write_text(text + "\n")
        part.replace(path)

    def as_json(self) -> dict[str, Any]:
        """What `write` writes: samples, and what follows from them."""
        return {
            "benchmark": self.benchmark,
            "machine": machine(),
            "cases": [_case_json(case) for case in self.cases],
            "host": [asdict(host) for host in self.host],
            "failures": self.failures,
        }


def _case_json(case: CaseResult) -> dict[str, Any]:
    rows = []
    for measured in case.measured:
        ratios = case.ratios(measured).items()
        found = {name: None if ratio is None else asdict(ratio) for name, ratio in ratios}
        rows.append({**asdict(measured), **found})
    return {**asdict(case), "ceiling": case.ceiling, "measured": rows}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import diffusers
    import torch

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
