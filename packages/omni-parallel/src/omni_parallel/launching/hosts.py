"""How many ranks a host has, on which devices, and where hosts meet."""

from __future__ import annotations

import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel.launching.processes import Nodes


def accelerators() -> int:
    """How many this host has."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def device_for(ranks: int) -> str | None:
    """The CPU where there are fewer accelerators than ranks; else ``None``: one for each."""
    return "cpu" if accelerators() < ranks else None


def nodes_for(count: int, endpoint: str | None, run_id: str) -> Nodes:
    """The hosts of a run.

    Args:
        count: How many.
        endpoint: Where they meet; needed of several.
        run_id: What several call the run.

    Raises:
        ParallelConfigError: Several have no place to meet.
    """
    if count == 1:
        return Nodes()
    if endpoint is None:
        msg = f"--nnodes {count} needs --rdzv-endpoint HOST:PORT, the same on every host"
        raise ParallelConfigError(msg)
    return Nodes(count, endpoint, run_id)


def ranks_here(asked: int | None, needed: int, hosts: int) -> int:
    """Ranks on this host: those asked for, its share of those needed, or one for each accelerator.

    Args:
        asked: Of ``--nproc``; None if it was not given.
        needed: By the layout, on all hosts; 0 if there is none.
        hosts: How many there are.

    Returns:
        The number; 0 if there is nothing to go by.

    Raises:
        ParallelConfigError: Those needed are no multiple of the hosts.
    """
    if asked is not None:
        return asked
    if needed % hosts:
        msg = f"{needed} ranks of the layout on {hosts} hosts; legal: --nproc for each of them"
        raise ParallelConfigError(msg)
    return needed // hosts or accelerators()
