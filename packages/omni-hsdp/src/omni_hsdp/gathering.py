"""Gathers the weights of a sharded model for a while, and chooses when they are gathered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_hsdp.fsdp_internals import without_state_hooks
from omni_hsdp.gather_policy import GatherPolicy, policy_for
from omni_hsdp.sharded_model import record_of
from omni_hsdp.writing import kept_changes


@contextmanager
def gathered(model: nn.Module, *, write: bool = False) -> Iterator[nn.Module]:
    """Gather all weights once, for a whole request, in a ``with`` block.

    ``with gathered(transformer): ...`` around a denoising loop costs one gathering in place of
    one for each step. In the block the model holds plain parameters; at its end they are given
    up, whatever the policy.

    Args:
        model: A sharded model.
        write: Keep what was changed in the block: each rank takes its share of the parameters
            as they are at the end. Every rank makes the same changes; this is how adapters are
            fused into sharded weights.

    Raises:
        ParallelConfigError: The model is not sharded, or `write` is asked of weights that are
            cast when they are gathered, which would lose what the cast loses.
        ParallelError: With `write`: the block, or a forward in it, failed here or on another
            rank. All ranks raise at the end of the block, and none keeps changes of what is
            sharded; the model works on.
    """
    record = record_of(model)
    if write and record.cast_to is not None:
        msg = (
            f"weights are cast to {record.cast_to} when they are gathered, so changes cannot be "
            "kept exactly; shard with param_dtype=None, or load in that dtype"
        )
        raise ParallelConfigError(msg)
    if record.gatherer is None:
        yield model
        return
    if write and record.gatherer.gathered:
        msg = "gathered(write=True) inside gathered(); ask the outer one to write"
        raise ParallelConfigError(msg)
    if write:
        record.gatherer.release()  # what a policy kept
    shares = [parameter.current for parameter in record.parameters] if write else []
    record.gatherer.enter()
    try:
        with kept_changes(record, shares) if write else nullcontext(), without_state_hooks(model):
            yield model
    finally:
        record.gatherer.leave()


def release(model: nn.Module) -> None:
    """Give up what is gathered, for example before the VAE runs; the next forward gathers again.

    Of use with policies that keep weights. Communicates nothing.

    Raises:
        ParallelConfigError: The model is not sharded, or inside its `gathered` block.
    """
    record = record_of(model)
    if record.gatherer is None:
        return
    if record.gatherer.gathered:
        msg = "release() inside gathered(); the end of that block gives the weights up"
        raise ParallelConfigError(msg)
    record.gatherer.release()


def set_policy(model: nn.Module, policy: GatherPolicy | Literal["auto"]) -> None:
    """Change when the weights of a sharded model are gathered; on every rank alike.

    Args:
        model: A sharded model.
        policy: The policy, or ``"auto"`` for that of `choose_policy`: a collective.

    Raises:
        ParallelConfigError: The model is not sharded, that is no policy, or one that differs in
            ``cpu_offload``, which is fixed when a model is sharded.
    """
    record = record_of(model)
    if policy == "auto":
        policy = choose_policy(model)
    if not isinstance(policy, GatherPolicy):
        msg = f"policy={policy!r}; legal: a GatherPolicy, or 'auto'"
        raise ParallelConfigError(msg)
    if policy.cpu_offload != record.policy.cpu_offload:
        msg = (
            f"cpu_offload={policy.cpu_offload}, but the model was sharded with "
            f"cpu_offload={record.policy.cpu_offload}; remove_hsdp() and apply again to change it"
        )
        raise ParallelConfigError(msg)
    record.policy = policy
    if record.gatherer is not None:
        record.gatherer.policy = policy


def choose_policy(model: nn.Module, *, free_bytes: int | None = None) -> GatherPolicy:
    """The fastest policy for the memory that is free: on the rank of the group that has least.

    Everything stays gathered if it fits, with a quarter of what is free left to activations;
    else two blocks are gathered ahead if they fit; else one. A collective of the group.

    Args:
        model: A sharded model.
        free_bytes: In place of what is free on the device, or for the CPU on the host, divided
            by the ranks that share it.

    Raises:
        ParallelConfigError: The model is not sharded.
    """
    record = record_of(model)
    free = _free_bytes(record.device) if free_bytes is None else free_bytes
    if record.gatherer is not None:
        mine = torch.tensor([free], dtype=torch.int64, device=record.device)
        free = int(record.group.all_gather(mine).min())
    root, blocks = record.gathered_bytes()
    found = policy_for(free, root, list(blocks.values()))
    return GatherPolicy(found.prefetch, found.keep, record.policy.cpu_offload)


def _free_bytes(device: torch.device) -> int:
    """What is free for one more tensor here."""
    if device.type != "cpu":
        free: int = torch.get_device_module(device).mem_get_info(device)[0]
        return free
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return kilobytes * 1024 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
