"""How the ranks find each other: which rank this is, and the store they meet in."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

# Documented names of torch.distributed that its __init__ imports without re-exporting (2.13).
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from omni_group_coordinator import ParallelConfigError
from omni_group_coordinator.process_groups import check_backend
from omni_parallel_state._legal_values import check_degree

_METHODS = ("env", "tcp", "file")
_REMEDY = (
    "start the processes with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, "
    "or pass world_size=, rank= and distributed_init_method='tcp://host:port'"
)


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is; -1 for what is not known."""

    world_size: int
    rank: int
    local_rank: int
    needs_group: bool = True

    def check(self) -> None:
        """Refuse impossible numbers.

        Raises:
            ParallelConfigError: Names the legal ones.
        """
        if self.world_size != -1:
            check_degree("world_size", self.world_size)
        for name, value in (("rank", self.rank), ("local_rank", self.local_rank)):
            if value < -1:
                msg = f"{name}={value} is negative; legal: 0 or more, or -1 for the environment's"
                raise ParallelConfigError(msg)
        if -1 < self.world_size <= self.rank:
            msg = (
                f"rank={self.rank} is not in a world of {self.world_size} ranks; "
                f"legal: 0 to {self.world_size - 1}"
            )
            raise ParallelConfigError(msg)


class _OpenStore:
    """The store of the last ``env://`` init, kept open between a destroy and the next init.

    Where rank 0 hosts the store, closing it would cut off a rank that is already back.
    """

    address: tuple[str, str] | None = None
    store: Store | None = None


_open = _OpenStore()


def check_method(method: str) -> None:
    """Refuse a rendezvous of an unknown kind.

    Raises:
        ParallelConfigError: Names the known ones.
    """
    if urlsplit(method).scheme not in _METHODS:
        legal = ", ".join(f"{name}://" for name in _METHODS)
        msg = f"distributed_init_method={method!r} is no known method; legal: {legal}"
        raise ParallelConfigError(msg)


def resolve_place(asked: Place, method: str) -> Place:
    """Fill what was not asked for from the environment variables.

    Args:
        asked: What the caller passed.
        method: URL of the rendezvous.

    Raises:
        ParallelConfigError: An unknown method, or a rank or world size that nobody gave.
    """
    check_method(method)
    scheme = urlsplit(method).scheme
    world_size, rank, local_rank = asked.world_size, asked.rank, asked.local_rank
    if scheme == "env":
        world_size = _variable("WORLD_SIZE") if world_size == -1 else world_size
        rank = _variable("RANK") if rank == -1 else rank
    alone = scheme == "env" and "RANK" not in os.environ and world_size in {-1, 1} and rank < 1
    if alone:
        world_size, rank = 1, 0
    if local_rank == -1:
        local_rank = _variable("LOCAL_RANK")
    if local_rank == -1:
        local_rank = max(rank, 0) % max(torch.accelerator.device_count(), 1)
    place = Place(world_size, rank, local_rank, needs_group=not alone)
    missing = [name for name in ("world_size", "rank") if getattr(place, name) == -1]
    if missing:
        msg = f"{' and '.join(missing)} not known for {method!r}; {_REMEDY}"
        raise ParallelConfigError(msg)
    place.check()
    return place


def init_default_group(place: Place, method: str, backend: str, timeout: timedelta) -> None:
    """Make torch's default process group.

    No device is bound to it: torch then has every rank take part in making every later group, of
    gloo and of one rank too, which these do not expect. `ProcessGroupPool` binds each group.

    Raises:
        ParallelConfigError: ``env://`` without an address of the store, or an unknown backend.
    """
    check_backend(backend)
    store = _next_generation(place, timeout) if urlsplit(method).scheme == "env" else None
    if store is not None:
        store.set_timeout(timeout)
    try:
        dist.init_process_group(
            backend,
            None if store is not None else method,
            timeout,
            world_size=place.world_size,
            rank=place.rank,
            store=store,
        )
    except BaseException:
        _forget_failed_init()
        raise


def _forget_failed_init() -> None:
    """Let the next init of this process meet processes that have not failed.

    torch numbers its groups, and ranks only meet in groups of the same number. A default group
    that could not be made has taken a number, and only `destroy_process_group`, which there is
    nothing to call on, gives it back. Private name of torch, checked with 2.13.
    """
    if not dist.is_initialized():
        dist.distributed_c10d._world.group_count = 0


def _next_generation(place: Place, timeout: timedelta) -> Store:
    """A part of the store that no earlier default group has used.

    A store outlives the group: torchrun's agent hosts it for all attempts, and rank 0 may init a
    second time. A new group under the old keys would connect to addresses that are gone. The
    store itself counts the inits of each rank, so a rank's history in its process plays no part.
    """
    attempt = f"omni_parallel/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    address = (os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""))
    if not all(address):
        msg = f"MASTER_ADDR or MASTER_PORT is not set, so the ranks cannot meet; {_REMEDY}"
        raise ParallelConfigError(msg)
    store, generation = _open.store, None
    if store is not None and _open.address == address:
        with suppress(RuntimeError):  # whoever hosted it has ended; somebody else may now
            generation = store.add(f"{attempt}/rank_{place.rank}", 1)
    if store is None or generation is None:
        # torch's own handler knows whether torchrun's agent hosts the store or rank 0 must.
        store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))
        _open.store, _open.address = store, address
        generation = store.add(f"{attempt}/rank_{place.rank}", 1)
    return PrefixStore(f"{attempt}/init_{generation}", store)


def _variable(name: str) -> int:
    """A number from the environment; -1 where it is not set."""
    text = os.environ.get(name)
    if not text:
        return -1
    try:
        return int(text)
    except ValueError:
        msg = f"the environment variable {name}={text!r} is no whole number; {_REMEDY}"
        raise ParallelConfigError(msg) from None
