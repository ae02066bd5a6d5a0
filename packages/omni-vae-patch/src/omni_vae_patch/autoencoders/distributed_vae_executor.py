"""Split, execute, merge: tiles of any work on the ranks of a group.

For autoencoders that divide their work themselves. One that has tiling of its own needs none of
this: see `omni_vae_patch.tiles.TiledVae`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_parallel_state import get_vae_group
from omni_vae_patch.agreement import Attempt, settle
from omni_vae_patch.tiles.balance import balanced_owners
from omni_vae_patch.tiles.exchange import Piece, TileExchange

_DESTINATION = 0


@dataclass
class GridSpec:
    """How the tiles were cut, for the merge."""

    split_dims: tuple[int, ...]
    """Dimensions that were cut."""
    grid_shape: tuple[int, ...]
    """Tiles along each of them."""
    tile_spec: dict[str, Any] = field(default_factory=dict)
    """Whatever else the merge needs."""
    output_dtype: torch.dtype | None = None
    """Dtype in which tiles travel and are merged; default: that in which they were computed."""


@dataclass
class TileTask:
    """One tile to be executed."""

    tile_id: int
    grid_coord: tuple[int, ...]
    """Place in the grid; the merge finds the result under it."""
    tensor: Tensor | list[Tensor]
    """What it is executed on."""
    workload: int | float = 1
    """How long it takes in comparison with the others."""


@dataclass
class DistributedOperator:
    """Work that can be done in tiles."""

    split: Callable[[Tensor], tuple[list[TileTask], GridSpec]]
    """Cuts the input; runs on every rank, and must cut alike on all."""
    exec: Callable[[TileTask], Tensor]
    """Does one tile; any shape and dtype may come out."""
    merge: Callable[[dict[tuple[int, ...], Tensor], GridSpec], Tensor]
    """Joins the results, by place in the grid."""


class DistributedVaeExecutor:
    """Executes the tiles of an operator on the ranks of a group.

    Tiles go to ranks by workload, the longest first; results go point to point, in exact sizes,
    to the first rank of the group alone, which merges them. What the results look like is told
    when an operator first runs on an input shape, and remembered. A rank that fails in any step
    raises its own error and all others a `ParallelError` naming it; the group stays usable.

    Args:
        group: The ranks; default: those of the current parallel state's VAE dimension.

    Attributes:
        parallel_size: How many ranks execute tiles: the first of the group.
    """

    def __init__(self, group: GroupCoordinator | None = None) -> None:
        self.group = get_vae_group() if group is None else group
        self.parallel_size = self.group.world_size
        self._exchange = TileExchange(self.group)

    def set_parallel_size(self, parallel_size: int, mode: str = "tile") -> None:
        """Say how many ranks execute tiles; the same on every rank.

        Args:
            parallel_size: At most the group's size.
            mode: ``"tile"``.

        Raises:
            ParallelConfigError: There are not as many ranks, or another mode.
        """
        size = self.group.world_size
        if mode != "tile":
            msg = (
                f"mode={mode!r} is nothing that a tile executor does; legal here: 'tile' (the "
                "exact spatial mode is asked for with VaeParallelConfig)"
            )
            raise ParallelConfigError(msg)
        if parallel_size not in range(1, size + 1):
            msg = (
                f"parallel_size={parallel_size!r} does not fit group {self.group.name!r} of {size} "
                f"ranks; legal here: 1 to {size}"
            )
            raise ParallelConfigError(msg)
        self.parallel_size = parallel_size

    def execute(
        self, z: Tensor, operator: DistributedOperator, broadcast_result: bool = True
    ) -> Tensor:
        """Run an operator; call it on all ranks of the group, also on those without tiles.

        Args:
            z: The input, the same on every rank.
            operator: What to do.
            broadcast_result: Whether all ranks get the result, or the first alone.

        Returns:
            The merged result; an empty tensor on ranks that do not get it.

        Raises:
            Exception: A step failed on this rank: its own error.
            PeerOutOfMemoryError: Other ranks ran out of memory, and nothing else went wrong.
            ParallelError: A step failed on another rank, which the message names.
            RankMismatchError: The ranks have cut different tiles.
        """
        name = getattr(operator.exec, "__qualname__", type(operator.exec).__qualname__)
        cut = Attempt.of(partial(self._cut, operator, z, name))
        pieces: list[Piece] = [] if cut.error else cut.value[2]
        done = cut if cut.error else Attempt.of(partial(self._execute, operator, *cut.value))
        what = f"executing tiles with {name}"
        found = self._exchange.deliver(what, pieces, done, (_DESTINATION,), z.device)
        tasks, grid, _ = cut.value
        merged = Attempt()
        if self.group.rank_in_group == _DESTINATION:
            tiles = {task.grid_coord: found[index] for index, task in enumerate(tasks)}
            merged = Attempt.of(partial(_merged, operator, tiles, grid))
        what = f"merging tiles of {name}"
        if not broadcast_result:
            settle(self.group, what, merged)
            return z.new_empty(0) if merged.value is None else merged.value
        result = {0: merged.value} if merged.value is not None else {}
        mine = Attempt(result, merged.error)
        key = f"{name} merged from {[(piece.owner, piece.key) for piece in pieces]}"
        everyone = range(self.group.world_size)
        whole = self._exchange.deliver(what, [Piece(_DESTINATION, key)], mine, everyone, z.device)
        return whole[0]

    def _cut(
        self, operator: DistributedOperator, z: Tensor, name: str
    ) -> tuple[list[TileTask], GridSpec, list[Piece]]:
        tasks, grid = operator.split(z)
        _check_places(tasks, name)
        owners = balanced_owners([task.workload for task in tasks], self.parallel_size)
        pieces = [
            Piece(owner, f"{name} {index} at {task.grid_coord} of {_shapes(task.tensor)}")
            for index, (task, owner) in enumerate(zip(tasks, owners, strict=True))
        ]
        return tasks, grid, pieces

    def _execute(
        self,
        operator: DistributedOperator,
        tasks: list[TileTask],
        grid: GridSpec,
        pieces: list[Piece],
    ) -> dict[int, Tensor]:
        results = {}
        for index, (task, piece) in enumerate(zip(tasks, pieces, strict=True)):
            if piece.owner == self.group.rank_in_group:
                result = _tensor("exec", operator.exec(task), f" for the tile at {task.grid_coord}")
                results[index] = result.detach().to(grid.output_dtype or result.dtype)
        return results


def _merged(
    operator: DistributedOperator, tiles: dict[tuple[int, ...], Tensor], grid: GridSpec
) -> Tensor:
    return _tensor("merge", operator.merge(tiles, grid))


def _tensor(step: str, result: Any, where: str = "") -> Tensor:
    if not isinstance(result, Tensor):
        msg = f"{step} returned a {type(result).__qualname__}{where}; legal here: a tensor"
        raise ParallelConfigError(msg)
    return result


def _check_places(tasks: list[TileTask], name: str) -> None:
    """The merge finds results by their place, so each place has one tile."""
    seen: dict[tuple[int, ...], int] = {}
    for index, task in enumerate(tasks):
        other = seen.setdefault(task.grid_coord, index)
        if other != index:
            msg = (
                f"split for {name} put tiles {other} and {index} both at grid_coord="
                f"{task.grid_coord}, so that the merge would miss one; legal: a place for each"
            )
            raise ParallelConfigError(msg)


def _shapes(tensors: Tensor | list[Tensor]) -> str:
    found = [tensors] if isinstance(tensors, Tensor) else tensors
    return " ".join(f"{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}" for t in found)


class DistributedVaeMixin:
    """For autoencoder classes that run their tiles through an executor.

    Attributes:
        distributed_executor: After `init_distributed`.
    """

    distributed_executor: DistributedVaeExecutor | None = None

    def init_distributed(self, group: GroupCoordinator | None = None) -> None:
        """Make the executor.

        Args:
            group: As of `DistributedVaeExecutor`.
        """
        self.distributed_executor = DistributedVaeExecutor(group)

    def set_parallel_size(self, parallel_size: int, mode: str = "tile") -> None:
        """As `DistributedVaeExecutor.set_parallel_size`; makes the executor if there is none."""
        if self.distributed_executor is None:
            self.init_distributed()
        if self.distributed_executor is not None:
            self.distributed_executor.set_parallel_size(parallel_size, mode)

    def is_distributed_enabled(self) -> bool:
        """Whether tiles go to several ranks: there is an executor of several, and tiling is on."""
        executor = self.distributed_executor
        return (
            executor is not None
            and executor.parallel_size > 1
            and bool(getattr(self, "use_tiling", False))
        )
