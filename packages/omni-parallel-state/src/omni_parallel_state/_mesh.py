"""Views of a state's groups as torch meshes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, ParallelError
from omni_parallel_state.dims import Dim, parse_dims
from omni_parallel_state.layout import ParallelLayout


@dataclass
class MeshMaker:
    """Makes meshes for one rank of a layout, and owns the group that dimensions of size 1 need."""

    layout: ParallelLayout
    rank: int
    device: torch.device
    backend: str
    timeout: timedelta
    _meshes: dict[tuple[str, ...], DeviceMesh] = field(default_factory=dict)
    _alone: ProcessGroup | None = None

    def mesh(
        self, dims: tuple[str, ...], coordinators: Mapping[str, GroupCoordinator]
    ) -> DeviceMesh:
        """The mesh over `dims`, made at the first call.

        Raises:
            ParallelConfigError: A dimension is unknown, or is several joined ones.
            ParallelError: torch's default group does not exist.
        """
        if dims not in self._meshes:
            ranks = self.layout.grid_of(self.rank, dims)
            for name in dims:
                if len(parse_dims(name)) > 1:
                    msg = f"{name!r} is no dimension of a mesh; legal: one of {', '.join(Dim)}"
                    raise ParallelConfigError(msg)
            if not dist.is_initialized():
                msg = (
                    "torch makes no DeviceMesh without a process group; call "
                    "init_distributed_environment() with a tcp:// or file:// method, or under "
                    "torchrun, or leave a layout of one rank without a mesh"
                )
                raise ParallelError(msg)
            shape = [self.layout.degree(name) for name in dims]
            groups = [self._group(coordinators[parse_dims(name)[0]]) for name in dims]
            self._meshes[dims] = DeviceMesh.from_group(
                groups,
                self.device.type,
                torch.tensor(ranks, device="cpu").reshape(shape),
                mesh_dim_names=tuple(str(name) for name in dims),
            )
        return self._meshes[dims]

    def _group(self, coordinator: GroupCoordinator) -> ProcessGroup:
        if coordinator.device_group is not None:
            return coordinator.device_group
        if self._alone is None:
            # Local synchronisation: only this rank takes part, so it need not agree with others
            # on when. The name that torch makes for it holds the rank and collides with nothing.
            alone = dist.new_group(
                [self.rank], self.timeout, self.backend, use_local_synchronization=True
            )
            self._alone = alone
        return self._alone

    def destroy(self) -> None:
        """Destroy the group of one rank; a second call does nothing."""
        alone, self._alone = self._alone, None
        self._meshes.clear()
        if alone is not None and dist.is_initialized():
            dist.destroy_process_group(alone)
