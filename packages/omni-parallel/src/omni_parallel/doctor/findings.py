"""What this machine has, and what is wrong with it in plain words."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from omni_parallel.doctor.self_test import SelfTest
from omni_parallel.v1 import PackageVersion

_BACKENDS = ("gloo", "nccl", "xccl", "hccl", "ucc", "mpi")
_SHARED_MEMORY = "/dev/shm"
_LEAST_SHARED_MEMORY = 64 * 2**20


@dataclass(frozen=True)
class Machine:
    """What there is."""

    python: str
    torch: str
    system: str
    cores: int
    accelerator: str | None
    """Type of the accelerators; None: there is none."""
    devices: tuple[str, ...]
    """Their names."""
    backends: tuple[str, ...]
    """Of torch.distributed, as it was built."""
    libraries: dict[str, bool]
    """Whether optional packages are installed."""

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        count = 0 if kind is None else torch.accelerator.device_count()
        return cls(
            platform.python_version(),
            torch.__version__,
            f"{platform.system()} {platform.machine()}",
            os.cpu_count() or 1,
            None if kind is None else kind.type,
            tuple(f"{kind.type}:{index}" for index in range(count)) if kind is not None else (),
            tuple(filter(dist.is_backend_available, _BACKENDS)),
            {name: find_spec(name) is not None for name in ("diffusers", "transformers", "peft")},
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def findings(
    machine: Machine, packages: tuple[PackageVersion, ...], test: SelfTest | str, ranks: int
) -> list[str]:
    """What is wrong, and what to do about it.

    Args:
        machine: What there is.
        packages: What is installed.
        test: What the ranks measured, or why they could not.
        ranks: How many there were.
    """
    found = [package.problem for package in packages if package.problem]
    missing = [package.name for package in packages if package.version is None]
    if missing:
        found.append(f"not installed: {', '.join(missing)}; try: pip install {' '.join(missing)}")
    if not machine.libraries["diffusers"]:
        found.append("diffusers is not installed; try: pip install 'omni-parallel[diffusers]'")
    if machine.accelerator is None:
        found.append("there is no accelerator that torch can use; ranks run on the CPU")
    elif len(machine.devices) < ranks:
        found.append(f"{ranks} ranks need as many accelerators, here is {len(machine.devices)}")
    if os.path.isdir(_SHARED_MEMORY):
        free = shutil.disk_usage(_SHARED_MEMORY).free
        if free < _LEAST_SHARED_MEMORY:
            found.append(
                f"{_SHARED_MEMORY} has {free / 2**20:.0f} MB free, and ranks of one host may need "
                "more of it; in a container: --shm-size=1g"
            )
    return found + _of_test(test)


def _of_test(test: SelfTest | str) -> list[str]:
    if isinstance(test, str):
        return [f"ranks cannot work together: {test}"]
    found = [f"{one.operation} gives wrong data" for one in test.operations if not one.right]
    links = test.links
    if len(links) > 1:
        slow, fast = min(links, key=lambda name: links[name]), max(links.values())
        if links[slow] * 4 < fast:
            found.append(
                f"ranks {slow.replace('-', ' and ')} send {links[slow]:.1f} GB/s to each other, "
                f"others up to {fast:.1f}; keep ulysses among the ranks whose links are fast"
            )
    return found
