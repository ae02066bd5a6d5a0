"""What ``omni-parallel plan`` says: a table for people, one object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from omni_parallel.model_files import ModelFiles
from omni_parallel.plan.counting import Counted
from omni_parallel.plan.machine import Machine
from omni_parallel.plan.memory import USABLE
from omni_parallel.plan.prediction import Prediction, fused_options
from omni_parallel.v1 import ParallelConfig

SHOWN = 12
"""Rows of the table, unless all are asked for."""


@dataclass(frozen=True)
class Plan:
    """The layouts of a request, the fastest first."""

    files: ModelFiles
    counted: Counted
    machine: Machine
    alone: Prediction
    """Of one rank."""
    found: Sequence[Prediction]
    automatic: ParallelConfig
    """What ``parallelize`` takes without a configuration."""

    def fits(self, one: Prediction) -> bool:
        """Whether a rank has room for it."""
        return one.memory.total <= USABLE * self.machine.gpu.memory_gb * 1e9

    @property
    def shown(self) -> list[Prediction]:
        """The fastest that fit, and in any case the automatic one."""
        fitting = [one for one in self.found if self.fits(one)]
        return [
            one
            for one in self.found
            if one in fitting[:SHOWN] or str(one.config) == str(self.automatic)
        ]

    def table(self, *, every: bool) -> Table:
        """One row for each layout."""
        names = ("layout", "GB", "MB/step", "compute", "links", "ms/step", "s", "×", "")
        table = Table(*names, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[0].overflow = "fold"
        for column in table.columns[1:-1]:
            column.justify = "right"
            column.no_wrap = True
        for one in self.found if every else self.shown:
            marks = ["auto"] * (str(one.config) == str(self.automatic))
            marks += ["too large"] * (not self.fits(one))
            table.add_row(
                str(replace(one.config, vae_patch=1)),
                f"{one.memory.total / 1e9:.1f}",
                _short(one.step_bytes / 1e6),
                _short(one.compute * 1e3),
                _short(one.link * 1e3),
                _short(one.step * 1e3),
                _short(one.total),
                f"{self.alone.total / one.total:.2f}",
                ", ".join(marks),
            )
        return table

    def about(self) -> str:
        """What is planned, in one line."""
        counted, machine = self.counted, self.machine
        work = counted.work
        video = f" x {counted.frames} frames" if counted.frames > 1 else ""
        guided = f"{work.branches} branches" if work.branches > 1 else "no guidance"
        hosts = f" on {machine.nodes} hosts" if machine.nodes > 1 else ""
        vae = self.automatic.vae_patch
        beside = f"; vae_patch={vae} beside every layout" if vae > 1 else ""
        return (
            f"{self.files.facts.name}, {counted.width} x {counted.height}{video}, {work.steps} "
            f"steps, {guided}: {_short(work.branches * work.denoiser.flops / 1e12)} TFLOP a step; "
            f"{machine.ranks} {machine.gpu.name}{hosts}{beside}"
        )

    def left_out(self) -> str | None:
        """How many layouts the table lacks, and why."""
        large = sum(not self.fits(one) for one in self.found)
        rest = len(self.found) - len(self.shown)
        if not rest:
            return None
        usable = USABLE * self.machine.gpu.memory_gb
        why = f"{large} do not fit {usable:.0f} GB" if large else "they are slower"
        return f"{rest} more of {len(self.found)} legal layouts with --all; {why}"

    def assumptions(self) -> list[str]:
        """The model of compute and links, and what it leaves out."""
        gpu, machine = self.machine.gpu, self.machine
        patches, warm_up = fused_options(ParallelConfig(pipefusion=2))
        return [
            f"compute = FLOPs / ({gpu.tflops:g} TFLOP/s x {machine.efficiency:g}), of decoding x "
            f"{machine.decode_efficiency:g}; or reading the weights of a call at "
            f"{gpu.memory_gbps:g} GB/s where that takes longer",
            f"links = bytes / ({gpu.link_gbps:g} GB/s x {machine.link_efficiency:g}) within a "
            f"host, / ({gpu.node_link_gbps:g} GB/s x {machine.link_efficiency:g}) for groups that "
            "span hosts; no time for starting a message",
            "hidden behind computing: keys and values of ring behind attention, sharded weights "
            "and pipefusion's messages behind the step, stages' messages but the first and the "
            "last; not hidden: ulysses, guidance, the joining of tokens",
            "pp: the branches of a step fill the stages; pipefusion: an approximation, with "
            f"{patches} patches and {warm_up} exact step",
            "memory = weights + kept keys and values + the larger of a step's and decoding's "
            f"intermediate tensors; it fits up to {USABLE:.0%} of {gpu.memory_gb:g} GB",
            "left out: text encoders' time, the scheduler, loading, norms and other operations "
            "that are no products, halos' counts of group norms, imbalance beyond whole heads, "
            "tokens and blocks",
            *self.counted.notes,
        ]

    def to_dict(self, *, every: bool) -> dict[str, Any]:
        """The same for programs: bytes and seconds, without rounding."""
        counted, work = self.counted, self.counted.work
        return {
            "model": {
                "name": self.files.name,
                "class": self.files.facts.name,
                "denoiser": self.files.facts.denoiser,
                "weight_bytes": {
                    "denoisers": work.denoisers * sum(part.weights for part in work.parts),
                    **(work.weights or {}),
                },
                "flops_per_step": work.branches * work.denoiser.flops,
                "flops_decode": None if work.decode is None else work.decode.flops,
            },
            "request": {
                "width": counted.width,
                "height": counted.height,
                "frames": counted.frames,
                "steps": work.steps,
                "branches": work.branches,
                "text_tokens": work.text,
            },
            "machine": asdict(self.machine),
            "assumptions": self.assumptions(),
            "one_rank": self._row(self.alone),
            "layouts": [self._row(one) for one in (self.found if every else self.shown)],
            "legal_layouts": len(self.found),
        }

    def _row(self, one: Prediction) -> dict[str, Any]:
        return {
            "layout": str(one.config),
            "auto": str(one.config) == str(self.automatic),
            "fits": self.fits(one),
            "exact": one.config.pipefusion == 1,
            "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
            "bytes_per_step": one.step_bytes,
            "bytes_per_step_by": one.sent,
            "bytes_decode": one.decode_sent,
            "compute_seconds": one.compute,
            "link_seconds": one.link,
            "step_seconds": one.step,
            "decode_seconds": one.decode,
            "total_seconds": one.total,
            "speedup": self.alone.total / one.total,
        }


def _short(value: float) -> str:
    """Three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
