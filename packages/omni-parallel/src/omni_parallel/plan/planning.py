"""From the options of ``omni-parallel plan`` to its plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from omni_group_coordinator import ParallelConfigError
from omni_parallel.model_files import ModelFiles
from omni_parallel.plan.candidates import candidates
from omni_parallel.plan.counting import Asked, count
from omni_parallel.plan.gpu_types import GpuType, gpu_type
from omni_parallel.plan.machine import Machine
from omni_parallel.plan.prediction import predict
from omni_parallel.plan.report import Plan
from omni_parallel.v1 import ParallelConfig, auto_config


def planned(given: Mapping[str, Any], console: Console) -> Plan:
    """Every legal layout of what the command was asked, the fastest first.

    Args:
        given: Its options.
        console: Where progress is shown.

    Raises:
        ParallelConfigError: It cannot be.
    """
    machine = _machine(given)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading the configuration", total=None)
        files = ModelFiles.find(given["model"])
        asked = Asked(
            width=given["width"],
            height=given["height"],
            frames=given["frames"],
            steps=given["steps"],
            text=given["text_tokens"],
            guidance=given["guidance"],
            dtype=given["dtype"],
        )
        counted = count(files, asked, lambda text: progress.update(task, description=text))
        progress.update(task, description="comparing layouts")
        work = counted.work
        size = (counted.width, counted.height, counted.frames)
        facts = replace(files.facts, branches=work.branches)
        legal = candidates(machine.ranks, facts, counted.kind, work.branches, size)
        found = [predict(work, config, machine) for config in legal]
    found.sort(key=lambda one: (one.total, one.step_bytes, len(str(one.config))))
    alone = predict(work, ParallelConfig(), replace(machine, ranks=1, nodes=1))
    return Plan(files, counted, machine, alone, found, auto_config(machine.ranks, facts))


def _machine(given: Mapping[str, Any]) -> Machine:
    """The accelerators that are asked for.

    Raises:
        ParallelConfigError: There are none of that name, or hosts would differ.
    """
    changed = {
        "tflops": given["tflops"],
        "memory_gb": given["memory"],
        "memory_gbps": given["bandwidth"],
        "link_gbps": given["link"],
        "node_link_gbps": given["node_link"],
    }
    kept: dict[str, Any] = {name: value for name, value in changed.items() if value is not None}
    gpu: GpuType = replace(gpu_type(given["gpu"]), **kept)
    ranks, nodes = given["gpus"], given["nodes"]
    if ranks % nodes:
        legal = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        msg = f"--nodes {nodes}: {ranks} accelerators are not as many on each; legal: {legal}"
        raise ParallelConfigError(msg)
    return Machine(
        gpu,
        ranks,
        nodes,
        efficiency=given["efficiency"],
        link_efficiency=given["link_efficiency"],
    )
