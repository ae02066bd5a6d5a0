"""Examining this machine and what is installed, with collectives on real ranks."""

from __future__ import annotations

import tempfile
from dataclasses import asdict

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_parallel.doctor.findings import Machine, findings
from omni_parallel.doctor.self_test import Measured, SelfTest, run_self_test
from omni_parallel.launching.failures import first_failure
from omni_parallel.launching.processes import run_processes
from omni_parallel.reported_command import Outcome
from omni_parallel.v1 import PackageVersion, versions


def examine(nproc: int | None, as_json: bool) -> Outcome:
    """Try collectives, and find what is wrong.

    Args:
        nproc: Ranks; None: one for each accelerator, 2 at least.
        as_json: Whether tables and words are left out.
    """
    machine, packages = Machine.here(), versions()
    ranks = nproc or max(2, len(machine.devices))
    console = Console(stderr=as_json, markup=False, emoji=False)
    test = _tried(ranks, machine, console)
    wrong = findings(machine, packages, test, ranks)
    if not as_json:
        _print(machine, packages, test, wrong, console)
    right = not isinstance(test, str) and all(one.right for one in test.operations)
    keys = {
        "ranks": ranks,
        "machine": machine.to_dict(),
        "packages": [asdict(package) for package in packages],
        "self_test": {"error": test} if isinstance(test, str) else test.to_dict(),
        "findings": wrong,
    }
    return Outcome(keys, passed=right and not any(package.problem for package in packages))


def _tried(ranks: int, machine: Machine, console: Console) -> SelfTest | str:
    device = "cpu" if len(machine.devices) < ranks else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="omni-parallel-") as folder,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        progress.add_task(f"collectives on {ranks} ranks", total=None)
        try:
            found = run_processes(run_self_test, (device,), ranks, folder)[0]
        except ChildFailedError as error:
            return first_failure(error)
    operations = [Measured(**one) for one in found["operations"]]
    return SelfTest(found["backend"], found["device"], operations, found["links"])


def _print(
    machine: Machine,
    packages: tuple[PackageVersion, ...],
    test: SelfTest | str,
    wrong: list[str],
    console: Console,
) -> None:
    devices = ", ".join(machine.devices) or "none"
    console.print(
        f"Python {machine.python}, torch {machine.torch}, {machine.system}, {machine.cores} cores\n"
        f"accelerators: {devices}; backends: {', '.join(machine.backends)}",
        highlight=False,
    )
    console.print(_packages_table(packages))
    if isinstance(test, SelfTest):
        console.print(_operations_table(test))
    for text in wrong:
        console.print(f"- {text}", highlight=False, soft_wrap=True)
    if not wrong:
        console.print("nothing is wrong")


def _packages_table(packages: tuple[PackageVersion, ...]) -> Table:
    table = Table("package", "version", "strategies")
    for package in packages:
        version = package.version or "not installed"
        table.add_row(package.name, version, ", ".join(package.strategies))
    return table


def _operations_table(test: SelfTest) -> Table:
    where = torch.device(test.device).type
    table = Table(f"{test.backend} on {where}", "result", "µs at 4 KB", "GB/s at 16 MB")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in test.operations:
        result = "right" if one.right else "WRONG"
        speed = f"{one.gigabytes_per_second:.2f}"
        table.add_row(one.operation, result, f"{one.microseconds:.0f}", speed)
    for name, carried in test.links.items():
        table.add_row(f"message {name.replace('-', ' → ')}", "", "", f"{carried:.2f}")
    return table
