"""The decode method of a pipeline's VAE, replaced by one that runs on several ranks.

Kept for code that calls it. `omni_vae_patch.parallelize_vae` decodes videos as well, encodes, and
can give exactly the picture of one rank, which patches do not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_group_coordinator.utils import split_sizes
from omni_vae_patch.autoencoders import (
    DistributedOperator,
    DistributedVaeExecutor,
    GridSpec,
    TileTask,
)
from omni_vae_patch.tiles import TiledVae


def _factor_pp_grid(pp_size: int) -> tuple[int, int]:
    """Rows and columns of the most square grid of so many patches; no fewer columns than rows."""
    rows = next(rows for rows in range(math.isqrt(pp_size), 0, -1) if pp_size % rows == 0)
    return rows, pp_size // rows


class VaePatchParallelism:
    """Decodes latents of images on several ranks; each rank returns the whole picture.

    With the VAE's tiling on, and a latent larger than a tile, the tiles are divided, and the
    result equals the VAE's own tiled one. Otherwise each rank decodes a patch and some latent
    around it: an approximation, whose norms and attention see no more than that.

    Args:
        vae: With a method ``decode(z, return_dict)``.
        vae_patch_parallel_size: How many patches there are; at most the ranks of the group.
        group_getter: Gives the torch group; called with the first decode.

    Raises:
        ParallelConfigError: No positive size.
    """

    def __init__(
        self,
        vae: Any,
        *,
        vae_patch_parallel_size: int,
        group_getter: Callable[[], ProcessGroup],
    ) -> None:
        if vae_patch_parallel_size < 1:
            msg = (
                f"vae_patch_parallel_size={vae_patch_parallel_size!r} is no number of patches; "
                "legal here: 1 to the number of ranks"
            )
            raise ParallelConfigError(msg)
        self.vae = vae
        self._size = vae_patch_parallel_size
        self._group_getter = group_getter
        self._decode = vae.decode
        self._running: tuple[TiledVae, DistributedVaeExecutor] | None = None

    def decode(self, z: Tensor, return_dict: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As the VAE's own; latents that are not of images go to it. Call it on all ranks.

        Raises:
            ParallelConfigError: The group has fewer ranks than there are patches.
            ParallelError: A rank failed; it raises its own error.
        """
        if z.ndim != 4 or self._size == 1:
            return self._decode(z, return_dict, *args, **kwargs)
        tiled, executor = self._ready()
        if _is_tiled(self.vae, z):
            return tiled.decode(z, return_dict, *args, **kwargs)

        def decode_patch(patch: Tensor) -> Tensor:
            picture: Tensor = self._decode(patch, False, *args, **kwargs)[0]
            return picture

        operator = _patch_operator(decode_patch, _patches(self.vae, z, self._size))
        with torch.no_grad():
            picture = executor.execute(z, operator)
        return _output_class(self.vae)(sample=picture) if return_dict else (picture,)

    def remove(self) -> None:
        """Give the VAE its own method back, if this object's has its place."""
        if getattr(self.vae.__dict__.get("decode"), "__self__", None) is self:
            del self.vae.__dict__["decode"]
            if self.vae.decode != self._decode:
                self.vae.decode = self._decode

    def _ready(self) -> tuple[TiledVae, DistributedVaeExecutor]:
        if self._running is None:
            group = _coordinator(self._group_getter())
            executor = DistributedVaeExecutor(group)
            executor.set_parallel_size(self._size)
            tiled = TiledVae(self.vae, group, decode=self._decode)
            self._running = tiled, executor
        return self._running


def maybe_wrap_vae_decode_with_patch_parallelism(
    pipeline: Any, *, vae_patch_parallel_size: int, group_getter: Callable[[], ProcessGroup]
) -> VaePatchParallelism | None:
    """Let a pipeline's VAE decode on several ranks.

    Args:
        pipeline: With an attribute ``vae``; one without is left alone.
        vae_patch_parallel_size: How many patches there are; 1 or less changes nothing.
        group_getter: Gives the torch group of the ranks.

    Returns:
        What decodes from now on; its `remove` undoes it. ``None`` if nothing was changed.
    """
    vae = getattr(pipeline, "vae", None)
    if vae_patch_parallel_size <= 1 or vae is None or not hasattr(vae, "decode"):
        return None
    wrapper = VaePatchParallelism(
        vae, vae_patch_parallel_size=vae_patch_parallel_size, group_getter=group_getter
    )
    vae.decode = wrapper.decode
    return wrapper


def _coordinator(group: ProcessGroup) -> GroupCoordinator:
    beside = None
    if "gloo" not in str(dist.get_backend(group)):
        # What the ranks tell each other is on the CPU; only the group's own ranks are here.
        ranks = dist.get_process_group_ranks(group)
        beside = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return GroupCoordinator.from_process_group(group, cpu_group=beside, name="vae patches")


def _is_tiled(vae: Any, z: Tensor) -> bool:
    smallest = getattr(vae, "tile_latent_min_size", None)
    sides = (
        getattr(vae, "tile_latent_min_height", smallest),
        getattr(vae, "tile_latent_min_width", smallest),
    )
    if not getattr(vae, "use_tiling", False):
        return False
    return any(side is None or z.shape[-2 + at] > side for at, side in enumerate(sides))


_Span = tuple[int, int, int, int]
"""Where the halo of a patch begins, the patch, its end, and the end of its halo."""


def _patches(vae: Any, z: Tensor, size: int) -> list[list[_Span]]:
    """The spans of the patches along height and width."""
    tile = getattr(vae, "tile_latent_min_size", 0)
    overlap = int(tile * getattr(vae, "tile_overlap_factor", 0))
    return [
        _spans(z.shape[-2 + at], parts, overlap) for at, parts in enumerate(_factor_pp_grid(size))
    ]


def _patch_operator(
    decode: Callable[[Tensor], Tensor], sides: list[list[_Span]]
) -> DistributedOperator:
    """Patches of a latent with a halo, whose decoded halo is cropped."""

    def split(whole: Tensor) -> tuple[list[TileTask], GridSpec]:
        tasks: list[TileTask] = []
        for place in product(*(range(len(side)) for side in sides)):
            (top, _, _, bottom), (left, _, _, right) = (sides[at][place[at]] for at in (0, 1))
            patch = whole[..., top:bottom, left:right]
            tasks.append(TileTask(len(tasks), place, patch, patch.numel()))
        return tasks, GridSpec((-2, -1), (len(sides[0]), len(sides[1])))

    def execute(task: TileTask) -> Tensor:
        patch = task.tensor
        if not isinstance(patch, Tensor):
            msg = "a patch is one tensor"
            raise TypeError(msg)
        picture = decode(patch)
        for at, place in enumerate(task.grid_coord):
            start, first, last, _ = sides[at][place]
            scale = picture.shape[-2 + at] // patch.shape[-2 + at]
            picture = picture.narrow(-2 + at, (first - start) * scale, (last - first) * scale)
        return picture

    def merge(found: dict[tuple[int, ...], Tensor], spec: GridSpec) -> Tensor:
        rows, columns = spec.grid_shape
        lines = [
            torch.cat([found[row, column] for column in range(columns)], -1) for row in range(rows)
        ]
        return torch.cat(lines, -2)

    return DistributedOperator(split, execute, merge)


def _spans(length: int, parts: int, overlap: int) -> list[_Span]:
    spans, first = [], 0
    for size in split_sizes(length, min(parts, length)):
        halo = max(overlap // 2, size // 2)
        last = first + size
        spans.append((max(0, first - halo), first, last, min(length, last + halo)))
        first = last
    return spans


def _output_class(vae: Any) -> Any:
    """What the VAE's own decode returns, found beside its class."""
    for cls in type(vae).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "DecoderOutput", None)
        if found is not None:
            return found
    return SimpleNamespace
