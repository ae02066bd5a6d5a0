"""Over which ranks the weights of a model are sharded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from omni_group_coordinator import GroupCoordinator, ParallelConfigError, ParallelError
from omni_hsdp.hsdp_config import REST, HSDPInferenceConfig, resolve_sizes
from omni_parallel_state import ParallelLayout, ParallelState, get_parallel_state

_NAMES = ("replicate", "shard")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a model, once their groups exist.

    Attributes:
        mesh: ``("replicate", "shard")``, or ``("shard",)`` if there is one copy.
        group: Those that share this rank's copy.
        copies: Those that hold the same share in other copies; None if there is one copy.
        close: Destroys what was made for this model alone.
    """

    mesh: DeviceMesh
    group: GroupCoordinator
    copies: GroupCoordinator | None
    close: Callable[[], None]


@dataclass(frozen=True)
class Placement:
    """The sizes, known before any communication, and how to come by the groups.

    Attributes:
        replicate: How many copies.
        shard: Ranks that share a copy; 1 leaves models alone.
        device: Where this rank computes.
    """

    replicate: int
    shard: int
    device: torch.device
    _make: Callable[[], Ranks]

    def ranks(self) -> Ranks:
        """The groups, made by the first call: a collective of all ranks."""
        return self._make()


def placement_of(
    config: HSDPInferenceConfig, state: ParallelState | None, mesh: DeviceMesh | None
) -> Placement:
    """Where the weights of a model go.

    Args:
        config: The sizes asked for.
        state: Its ``fs`` and ``replicate`` groups are used if its layout has them; else groups
            are made over its ranks. Default: the current state.
        mesh: In place of a state: dimensions ``("replicate", "shard")`` or ``("shard",)``.

    Raises:
        ParallelConfigError: The sizes contradict those of the layout or do not multiply to the
            ranks there are, or ranks would share weights that differ.
        ParallelError: Neither a state nor a mesh.
    """
    if mesh is not None:
        return _on_mesh(config, mesh)
    state = get_parallel_state() if state is None else state
    layout = state.layout
    _check_current(state.device)
    if layout.fs > 1:
        _check_agrees(config, layout)
        sizes = layout.replicate, layout.fs
        return Placement(*sizes, state.device, cache(lambda: _of_state(state, _nothing)))
    replicate, shard = resolve_sizes(config, layout.world_size)
    if shard > 1:
        _check_alike(layout)

    def make() -> Ranks:
        own = ParallelState(
            ParallelLayout(fs=shard, replicate=replicate),
            state.device,
            state.timeout,
            backend=state.backend,
        )
        return _of_state(own, own.destroy)

    return Placement(replicate, shard, state.device, cache(make))


def _check_agrees(config: HSDPInferenceConfig, layout: ParallelLayout) -> None:
    """Check that a configuration leaves the sizes to a layout that has them, or says the same."""
    replicate, shard = config.hsdp_replicate_size, config.hsdp_shard_size
    open_to_it = shard == REST and replicate in (1, layout.replicate)
    if not open_to_it and (replicate, shard) != (layout.replicate, layout.fs):
        msg = (
            f"hsdp_replicate_size={replicate}, hsdp_shard_size={shard} contradict the layout, "
            f"which has replicate={layout.replicate} and fs={layout.fs}; legal here (replicate × "
            f"shard): {layout.replicate} × {layout.fs}, or hsdp_shard_size=-1"
        )
        raise ParallelConfigError(msg)


def _check_alike(layout: ParallelLayout) -> None:
    """Check that all ranks of a layout without ``fs`` hold the same weights and call them alike."""
    reasons = {
        "tp": "whose ranks hold different weights",
        "pp": "whose ranks hold different weights",
        "dp": "whose ranks call the model unequally often",
    }
    for name, reason in reasons.items():
        size = getattr(layout, name)
        if size > 1:
            msg = (
                f"weights cannot be sharded over all {layout.world_size} ranks of a layout with "
                f"{name}={size}, {reason}; put fs= and replicate= into the layout"
            )
            raise ParallelConfigError(msg)


def _check_current(device: torch.device) -> None:
    """Check that torch puts on a rank's device what it puts on its current one."""
    if device.type != "cpu" and device.index is not None:
        current = torch.get_device_module(device).current_device()
        if current != device.index:
            msg = (
                f"this rank computes on {device}, but its current device is {current}; call "
                f"torch.accelerator.set_device_index({device.index}) first"
            )
            raise ParallelConfigError(msg)


def _nothing() -> None:
    """What is to be destroyed where nothing was made."""


def _of_state(state: ParallelState, close: Callable[[], None]) -> Ranks:
    names = _NAMES if state.layout.replicate > 1 else _NAMES[1:]
    copies = state.replicate if state.layout.replicate > 1 else None
    return Ranks(state.mesh(names), state.fs, copies, close)


def _on_mesh(config: HSDPInferenceConfig, mesh: DeviceMesh) -> Placement:
    names = mesh.mesh_dim_names
    if names not in (_NAMES, _NAMES[1:]):
        msg = f"the mesh has the dimensions {names}; legal: {_NAMES} or {_NAMES[1:]}"
        raise ParallelConfigError(msg)
    if mesh.get_coordinate() is None:
        msg = f"rank {dist.get_rank()} is not in the mesh {mesh}; use it on its ranks only"
        raise ParallelError(msg)
    replicate, shard = resolve_sizes(config, mesh.size())
    there = (mesh.size() // mesh["shard"].size(), mesh["shard"].size())
    if (replicate, shard) != there:
        msg = (
            f"replicate × shard is {replicate} × {shard} in the configuration and {there[0]} × "
            f"{there[1]} in the mesh; leave hsdp_shard_size at -1 and set "
            f"hsdp_replicate_size={there[0]}"
        )
        raise ParallelConfigError(msg)
    device = _device_of(mesh.device_type)

    def make() -> Ranks:
        found = [GroupCoordinator.from_device_mesh(mesh, "shard", device=device)]
        if replicate > 1:
            found.append(GroupCoordinator.from_device_mesh(mesh, "replicate", device=device))

        def close() -> None:
            for group in found:
                group.destroy()

        return Ranks(mesh, found[0], found[1] if replicate > 1 else None, close)

    return Placement(replicate, shard, device, cache(make))


def _device_of(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())
