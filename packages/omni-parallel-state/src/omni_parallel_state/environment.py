"""torch's default process group: made, adopted, and given up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
)
from omni_group_coordinator.process_groups import CPU_BACKEND, serves_cpu
from omni_group_coordinator.utils import backend_for_device, check_timeout, get_local_device
from omni_parallel_state._rendezvous import (
    Place,
    check_method,
    init_default_group,
    resolve_place,
)
from omni_parallel_state.current import default_state, find_parallel_state, set_default_state
from omni_parallel_state.state import (
    backend_alone,
    default_backend,
    default_device,
    local_rank_of,
)


@dataclass(frozen=True)
class Environment:
    """The world that this process is part of."""

    world: GroupCoordinator
    backend: str
    device: torch.device
    timeout: timedelta
    local_rank: int
    default_group: ProcessGroup | None
    """torch's default group when this was made; None for a world of one rank without a group."""
    owns_default_group: bool = False
    """Whether torch's default group was made here, and so is destroyed here."""


class _ProcessEnvironment:
    """There is one default group in a process, and so one environment."""

    current: Environment | None = None


_process = _ProcessEnvironment()


def find_environment() -> Environment | None:
    """What `init_distributed_environment` made, or None if torch's default group is another now."""
    environment = _process.current
    if environment is None or environment.default_group is not dist.group.WORLD:
        return None
    return environment


def get_world_group() -> GroupCoordinator:
    """The coordinator of all ranks.

    Raises:
        ParallelError: Neither `init_distributed_environment` nor a parallel state has been made.
    """
    state = find_parallel_state()
    if state is not None and not state.destroyed:
        return state.world
    environment = find_environment()
    if environment is None:
        msg = "the world is not known; call init_distributed_environment() first"
        raise ParallelError(msg)
    return environment.world


def init_world_group(ranks: list[int], local_rank: int, backend: str) -> GroupCoordinator:
    """A coordinator of all ranks with groups of its own, which its `destroy` destroys."""
    return GroupCoordinator([ranks], local_rank, backend, name="world")


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
    *,
    timeout: timedelta | None = None,
    device: torch.device | str | None = None,
) -> GroupCoordinator:
    """Make torch's default process group, or adopt the one there is.

    A world of one rank needs none, and gets none with ``env://`` unless ``RANK`` is set. Under
    ``env://`` each call uses keys of its own in the store, so that a worker which torchrun has
    restarted, or a second init after a destroy, does not meet what the first left behind; all
    ranks must init together. A second call with the same arguments does nothing.

    Args:
        world_size: Number of ranks; -1: ``WORLD_SIZE``.
        rank: Rank of this process; -1: ``RANK``.
        distributed_init_method: ``env://``, ``tcp://host:port`` or ``file:///path``.
        local_rank: Rank on this host; -1: ``LOCAL_RANK``, else the rank modulo the number of
            devices. Where this process sees one device only, it is that one.
        backend: torch backend; default: the one for the device (nccl, gloo, xccl, hccl, …).
        timeout: How long rendezvous and collectives may wait; default: 10 minutes.
        device: Device of this rank; default: the accelerator of the local rank, else the CPU.

    Returns:
        The coordinator of all ranks.

    Raises:
        ParallelConfigError: Arguments that cannot work, or that contradict an earlier call
            (world_size, rank, local_rank, backend, timeout or device).
    """
    asked = Place(world_size, rank, local_rank)
    asked.check()
    check_method(distributed_init_method)
    wait = check_timeout(timeout)
    environment = find_environment()
    if environment is None:
        if dist.is_initialized():
            environment = _adopt(asked.local_rank, backend, wait, device)
        else:
            place = resolve_place(asked, distributed_init_method)
            environment = _make(place, distributed_init_method, backend, wait, device)
    _check_agrees(environment, asked, {"backend": backend, "timeout": timeout, "device": device})
    _process.current = environment
    return environment.world


def destroy_distributed_environment() -> None:
    """Give up the world: the state of `initialize_model_parallel`, and then the default group.

    A default group that was there before `init_distributed_environment` stays. A second call does
    nothing.
    """
    environment, _process.current = find_environment(), None
    state = default_state()
    set_default_state(None)
    if state is not None:
        state.destroy()
    if environment is None:
        return
    environment.world.destroy()
    if environment.owns_default_group:
        dist.destroy_process_group()


def _adopt(
    local_rank: int, backend: str | None, timeout: timedelta, device: torch.device | str | None
) -> Environment:
    """Take the default group that the caller made."""
    backend = backend or default_backend(device)
    where = default_device(backend) if device is None else torch.device(device)
    if device is None and where.type != "cpu" and local_rank != -1:
        where = get_local_device(local_rank)
    local_rank = local_rank_of(where) if local_rank == -1 else local_rank
    world = _world_of_default_group(backend, where, timeout, local_rank)
    return Environment(world, backend, where, timeout, local_rank, dist.group.WORLD)


def _make(
    place: Place,
    method: str,
    backend: str | None,
    timeout: timedelta,
    device: torch.device | str | None,
) -> Environment:
    where, backend = _device_and_backend(place, backend, device)
    if where.type != "cpu" and where.index is not None:
        torch.accelerator.set_device_index(where.index)
    local = place.local_rank
    if not place.needs_group:
        world = GroupCoordinator([[0]], local, backend, name="world", device=where)
        return Environment(world, backend, where, timeout, local, None)
    init_default_group(place, method, backend, timeout)
    default = dist.group.WORLD
    try:
        world = _world_of_default_group(backend, where, timeout, local)
        world.barrier()  # a rank that destroyed it at once would cut off one that still connects
    except BaseException:
        dist.destroy_process_group()
        raise
    return Environment(world, backend, where, timeout, local, default, owns_default_group=True)


def _device_and_backend(
    place: Place, backend: str | None, device: torch.device | str | None
) -> tuple[torch.device, str]:
    """What was asked for, and what fits it; gloo without a device means the CPU."""
    if device is None and backend == CPU_BACKEND:
        return torch.device("cpu"), backend
    where = get_local_device(place.local_rank) if device is None else torch.device(device)
    if backend is None:
        backend = backend_for_device(where.type) if place.needs_group else backend_alone(where)
        if device is None and backend == CPU_BACKEND:
            where = torch.device("cpu")
    return where, backend


def _world_of_default_group(
    backend: str, device: torch.device, timeout: timedelta, local_rank: int
) -> GroupCoordinator:
    group = dist.group.WORLD
    # What it was made with may be another backend than the one that is asked for now.
    made_with = str(dist.get_backend())
    if group is not None and serves_cpu(backend) and made_with in _names_of(backend):
        return GroupCoordinator.from_process_group(
            group, name="world", timeout=timeout, device=device
        )
    ranks = list(range(dist.get_world_size()))
    return GroupCoordinator(
        [ranks], local_rank, backend, name="world", timeout=timeout, device=device
    )


def _names_of(backend: str) -> set[str]:
    """What torch may call a group of this backend: ``"cpu:gloo"`` is also ``"gloo"``."""
    parts = {part.rpartition(":")[2] for part in backend.split(",")}
    return {backend, "undefined"} | (parts if len(parts) == 1 else set())


def _check_agrees(environment: Environment, asked: Place, more: dict[str, object]) -> None:
    """Refuse arguments that contradict the world there is; -1 and None agree with anything.

    Raises:
        ParallelConfigError: Says both values and how to start again.
    """
    world = environment.world
    device = more["device"]
    pairs: dict[str, tuple[object, object]] = {
        "world_size": (asked.world_size, world.world_size),
        "rank": (asked.rank, world.rank),
        "local_rank": (asked.local_rank, environment.local_rank),
        "backend": (more["backend"], environment.backend),
        "timeout": (more["timeout"], environment.timeout),
        "device": (None if device is None else str(device), str(environment.device)),
    }
    for name, (wanted, present) in pairs.items():
        if wanted not in (-1, None, present):
            msg = (
                f"{name}={wanted!r} was asked for, but this process already has {name}="
                f"{present!r}; call destroy_distributed_environment() first, or leave {name} out"
            )
            raise ParallelConfigError(msg)
