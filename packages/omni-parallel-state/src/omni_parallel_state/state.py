"""The groups of a layout, for one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    PipelineGroupCoordinator,
    ProcessGroupPool,
    SequenceParallelGroupCoordinator,
)
from omni_group_coordinator.process_groups import CPU_BACKEND
from omni_group_coordinator.utils import backend_for_device, check_timeout, get_local_device
from omni_parallel_state._agreement import agree_over_world
from omni_parallel_state._layout_checks import world_error
from omni_parallel_state._legal_values import check_degree
from omni_parallel_state._mesh import MeshMaker
from omni_parallel_state.current import using
from omni_parallel_state.dims import GRID_DIMS, Dim
from omni_parallel_state.layout import ParallelLayout

CoordinatorT = TypeVar("CoordinatorT", bound=GroupCoordinator)


class _Options(TypedDict):
    """What every coordinator of a state is made with."""

    name: str
    timeout: timedelta
    debug: bool | None
    device: torch.device
    pool: ProcessGroupPool


class ParallelState:
    """A layout, this process's rank in it, and its coordinators.

    A group is made only where it has more than one rank, and once for each distinct set of ranks.
    In a layout of one rank nothing is made, and no process group of torch is needed. Everything
    is checked before the first group is made, and the ranks compare their layouts: where these
    differ, every rank raises. If making one fails, on any rank, every rank destroys
    what it has made and raises. Several states may live in one process.

    Args:
        layout: Its size must be that of the world.
        device: Device of this rank; default: the CPU for gloo, else the accelerator of the local
            rank if there is one.
        timeout: How long a collective may wait for its peers; default: 10 minutes.
        backend: torch backend of the groups; default: that of torch's default group, or the one
            for the device.
        debug: Compare each call over the ranks before it runs; default: the environment decides.

    Attributes:
        layout: The layout.
        rank: Global rank of this process.
        device: Its device.
        backend: Backend of the groups.
        timeout: Timeout of the groups.
        dp, cfg, pp, sp, ring, ulysses, tp, fs, replicate, vae, dit, world: The coordinator of
            each dimension, of size 1 where the degree is 1.

    Raises:
        ParallelConfigError: The layout has another size than the world, or other ranks ask for
            another layout.
        ParallelError: The layout or the environment has several ranks, but torch's default group
            does not exist; or another rank failed, which takes the timeout to notice.
    """

    pp: PipelineGroupCoordinator
    sp: SequenceParallelGroupCoordinator

    def __init__(
        self,
        layout: ParallelLayout,
        device: torch.device | str | None = None,
        timeout: timedelta | None = None,
        *,
        backend: str | None = None,
        debug: bool | None = None,
    ) -> None:
        check_default_group(layout.world_size)
        self.timeout = check_timeout(timeout)
        self.layout = layout
        self.backend = backend or default_backend(device)
        self.device = default_device(self.backend) if device is None else torch.device(device)
        agree_over_world(f"{layout} on {self.backend}", self.device, self.timeout)
        self.rank = _rank_in_world(layout)
        self._debug = debug
        self._pool = ProcessGroupPool(self.backend, timeout=self.timeout, device=self.device)
        self._meshes = MeshMaker(layout, self.rank, self.device, self.backend, self.timeout)
        self._stack = ExitStack()
        self._stack.callback(self._pool.destroy)
        self._stack.callback(self._meshes.destroy)
        self._destroyed = False
        self._default_group = dist.group.WORLD
        try:
            self._make_coordinators()
        except BaseException:
            self.destroy()
            raise

    def _make_coordinators(self) -> None:
        # The order is part of the contract: every rank makes every group at the same place.
        self.world = self._coordinator(Dim.WORLD)
        self.dp = self._coordinator(Dim.DP)
        self.cfg = self._coordinator(Dim.CFG)
        self.pp = self._keep(PipelineGroupCoordinator(*self._ranks(Dim.PP), **self._options("pp")))
        self.ring = self._coordinator(Dim.RING)
        self.ulysses = self._coordinator(Dim.ULYSSES)
        self.sp = self._keep(
            SequenceParallelGroupCoordinator(
                *self._ranks(Dim.SP),
                ulysses_group=self.ulysses,
                ring_group=self.ring,
                **self._options("sp"),
            )
        )
        self.tp = self._coordinator(Dim.TP)
        self.fs = self._coordinator(Dim.FS)
        self.replicate = self._coordinator(Dim.REPLICATE)
        self.vae = self._coordinator(Dim.VAE)
        self.dit = self._coordinator(Dim.DIT)
        # Nobody goes on before all are here: a rank that destroyed its groups at once would cut
        # off one that still connects, and a rank that failed is named on the others.
        self.world.barrier()

    @property
    def destroyed(self) -> bool:
        """Whether `destroy` has run, or torch's default group was destroyed with all others."""
        return self._destroyed or self._groups_are_gone()

    def use(self) -> AbstractContextManager[ParallelState]:
        """Make this the state that the getters read, within a ``with`` block.

        Raises:
            ParallelError: The state has been destroyed.
        """
        self._check_alive()
        return using(self)

    def mesh(self, dims: str | Sequence[str]) -> DeviceMesh:
        """A `DeviceMesh` over some dimensions, made of this state's own groups.

        Every rank of the world may call it on its own: only a dimension of degree 1 makes a group
        (of this rank alone, once), because torch wants one for each dimension of a mesh.

        Args:
            dims: One name, or names from slowest to fastest, which become the names of the
                mesh: for HSDP ``("replicate", "shard")``, where shard is torch's word for fs.

        Raises:
            ParallelConfigError: Unknown dimensions, or some that don't go together.
            ParallelError: The state has been destroyed, or there is no process group at all.
        """
        self._check_alive()
        names = (dims,) if isinstance(dims, str) else tuple(dims)
        return self._meshes.mesh(names, {dim: getattr(self, dim) for dim in Dim})

    def device_mesh(self) -> DeviceMesh:
        """A `DeviceMesh` over dp, cfg, pp, ring, ulysses and tp."""
        return self.mesh(GRID_DIMS)

    def set_dit_size(self, size: int, backend: str | None = None) -> GroupCoordinator:
        """Let only the first `size` ranks of the world run the transformer.

        Call it on every rank. The new coordinator replaces `dit`; on the other ranks it is one of
        this rank alone.

        Raises:
            ParallelConfigError: `size` is below 1 or above the world size.
        """
        self._check_alive()
        lists = _first_ranks(size, self.layout.world_size)
        pool = self._pool
        if backend is not None and backend != self.backend:
            pool = ProcessGroupPool(backend, timeout=self.timeout, device=self.device)
            self._stack.callback(pool.destroy)
        options = self._options("dit")
        options["pool"] = pool
        dit = GroupCoordinator(lists, local_rank_of(self.device), pool.backend, **options)
        self.dit = self._keep(dit)
        self.world.barrier()
        return dit

    def destroy(self) -> None:
        """Destroy every group that this state made; a second call does nothing."""
        if self._destroyed:
            return
        self._destroyed = True
        if self._groups_are_gone():
            self._stack.pop_all()  # torch refuses to destroy a group for the second time
        self._stack.close()

    def __repr__(self) -> str:
        return f"ParallelState(rank={self.rank}, {self.layout})"

    def _coordinator(self, dim: Dim) -> GroupCoordinator:
        return self._keep(GroupCoordinator(*self._ranks(dim), **self._options(dim)))

    def _ranks(self, dim: Dim) -> tuple[list[list[int]], int, str]:
        lists = [list(group) for group in self.layout.groups(dim)]
        return lists, local_rank_of(self.device), self.backend

    def _options(self, name: str) -> _Options:
        return _Options(
            name=str(name),
            timeout=self.timeout,
            debug=self._debug,
            device=self.device,
            pool=self._pool,
        )

    def _keep(self, coordinator: CoordinatorT) -> CoordinatorT:
        self._stack.callback(coordinator.destroy)
        return coordinator

    def _groups_are_gone(self) -> bool:
        return self._default_group is not None and dist.group.WORLD is not self._default_group

    def _check_alive(self) -> None:
        if self.destroyed:
            msg = (
                "this parallel state has been destroyed, or torch's default group was; make a new "
                "state"
            )
            raise ParallelError(msg)


def default_backend(device: torch.device | str | None = None) -> str:
    """The backend of torch's default group, or the one for a device where there is none."""
    where = get_local_device() if device is None else torch.device(device)
    if not dist.is_initialized():
        return backend_alone(where)
    backend = str(dist.get_backend())
    # "undefined" is what torch says of a default group made without a backend.
    return backend_for_device(where.type) if backend == "undefined" else backend


def backend_alone(device: torch.device) -> str:
    """The backend for a device, or gloo where none is known: one rank alone needs none."""
    try:
        return backend_for_device(device.type)
    except ParallelConfigError:
        return CPU_BACKEND


def default_device(backend: str) -> torch.device:
    """The CPU for gloo, else the device of the local rank."""
    return torch.device("cpu") if backend == "gloo" else get_local_device()


def local_rank_of(device: torch.device) -> int:
    """Rank on this host: of the environment, else the index of the device."""
    return int(os.environ.get("LOCAL_RANK") or device.index or 0)


def _first_ranks(size: int, world_size: int) -> list[list[int]]:
    """The first ranks as one group, each other rank alone."""
    check_degree("dit_parallel_size", size)
    if size > world_size:
        msg = (
            f"dit_parallel_size={size} is more than the {world_size} ranks there are; the nearest "
            f"legal value is {world_size}"
        )
        raise ParallelConfigError(msg)
    return [list(range(size)), *([rank] for rank in range(size, world_size))]


def check_default_group(world_size: int) -> None:
    """Check that torch's default group is there if there are several ranks.

    Raises:
        ParallelError: It is not; names the remedy.
    """
    if dist.is_initialized():
        return
    remedy = "call init_distributed_environment() first"
    if world_size > 1:
        msg = (
            f"a layout of {world_size} ranks needs torch's default process group; {remedy}, in "
            "processes started by torchrun"
        )
        raise ParallelError(msg)
    started = os.environ.get("WORLD_SIZE", "")
    if started.isdigit() and int(started) > 1 and os.environ.get("RANK"):
        msg = (
            f"this process was started as rank {os.environ['RANK']} of {started} (RANK and "
            "WORLD_SIZE in its environment), but torch's default process group does not exist, "
            f"so it would work alone; {remedy}"
        )
        raise ParallelError(msg)


def _rank_in_world(layout: ParallelLayout) -> int:
    """This rank, once it is known that the layout fits the world."""
    if not dist.is_initialized():
        return 0
    if layout.world_size != dist.get_world_size():
        degrees = {dim.value: int(getattr(layout, dim)) for dim in GRID_DIMS}
        raise world_error(dist.get_world_size(), degrees, exact=True)
    return dist.get_rank()
