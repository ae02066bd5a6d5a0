"""An autoencoder whose feature maps are sharded in space: the result is that of one rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import GroupCoordinator
from omni_vae_patch.agreement import agreed
from omni_vae_patch.attributes import plain_settings
from omni_vae_patch.gradients import refuse_gradients
from omni_vae_patch.spatial.beside import check_beside, parts_beside
from omni_vae_patch.spatial.geometry import Geometry, geometry_of
from omni_vae_patch.spatial.partition import HEIGHT, WIDTH, Partition, best_partition
from omni_vae_patch.spatial.region import Region
from omni_vae_patch.spatial.rules import Rule, Undo, apply_rule, rules_of
from omni_vae_patch.spatial.sharded_call import ShardedCall
from omni_vae_patch.spatial.unchanged import Unchanged
from omni_vae_patch.vae_config import VaeParallelConfig

_log = logging.getLogger("omni_vae_patch")
_NAMES = {HEIGHT: "height", WIDTH: "width"}
_DIMS = {"auto": (HEIGHT, WIDTH), "height": (HEIGHT,), "width": (WIDTH,)}


def side_of_fast_kernels(x: Tensor) -> int | None:
    """The side of a video that may be cut without torch choosing a slower convolution for it.

    On CPU torch's fast one takes inputs of more than 20480 elements in batch, channels, frames and
    height, whatever their width (``ConvParams::use_mkldnn``; measured on 2.13): half of a height
    may fall below, and then takes longer than the whole.
    """
    return WIDTH if x.ndim == 5 and x.device.type == "cpu" else None


class ExactVae:
    """Puts the rules on the modules of an autoencoder, and makes its calls on shards.

    Args:
        vae: With methods ``decode`` and ``encode``.
        group: The ranks.
        config: Which side, and who gets the result.

    Attributes:
        geometry: The shape of its latents and samples.
        dims: The sides that may be sharded.

    Raises:
        ParallelConfigError: A module mixes positions in space in a way that is not known.
    """

    def __init__(self, vae: Any, group: GroupCoordinator, config: VaeParallelConfig) -> None:
        rules = rules_of(vae)
        self._vae = vae
        self._group = group
        self.dims = _DIMS[config.dim]
        self._methods: dict[str, Callable[..., Any]] = {
            name: getattr(vae, name) for name in ("decode", "encode") if hasattr(vae, name)
        }
        self._region = Region()
        self._call = ShardedCall(group, vae, self._region, config.result)
        self._undo: list[Undo] = []
        self._result = config.result
        self._told = False
        try:
            self._apply(rules)
            self.geometry: Geometry = geometry_of(vae)
            self._unchanged = Unchanged(vae)
        except BaseException:
            self.remove()
            raise

    def _apply(self, rules: list[tuple[str, nn.Module, Rule]]) -> None:
        for name, module, rule in rules:
            self._undo.append(apply_rule(name, module, rule, self._region))

    def remove(self) -> None:
        """Give every module back as it was."""
        while self._undo:
            self._undo.pop()()

    # -- calls -----------------------------------------------------------------------------

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own ``decode``; the whole latent on every rank.

        Raises:
            RankMismatchError: On every rank: they were given latents of different shapes.
            ParallelError: It failed on another rank; on this one its own error.
        """
        return self._sharded("decode", z, args, kwargs)

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own ``encode``; the whole sample on every rank.

        A sample is sharded along a side that is a multiple of the compression. If neither is, or
        not the one that was asked for, it is encoded whole, by each rank that gets the result.

        Raises:
            RankMismatchError: On every rank: they were given samples of different shapes.
            ParallelError: It failed on another rank; on this one its own error.
        """
        return self._sharded("encode", x, args, kwargs)

    def _plan(
        self, method: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Partition | None:
        """How to divide a call; ``None`` if it cannot be divided."""
        self._unchanged.check(self._vae)
        scale = 1
        if method == "decode":
            self.geometry.check_latent(x)
        else:
            self.geometry.check_sample(x)
            scale = self.geometry.scale
        # The other side is whole on every rank, so it may have any length.
        dims = tuple(dim for dim in self.dims if not x.shape[dim] % scale)
        if not dims:
            self._tell(x)
            return None
        height, width = x.shape[-2] // scale, x.shape[-1] // scale
        ranks, least = self._group.world_size, self.geometry.least
        favoured = side_of_fast_kernels(x)
        partition = best_partition(height, width, ranks, dims, least, favoured=favoured)
        check_beside(args, kwargs, x, partition, method)
        return partition

    def _tell(self, x: Tensor) -> None:
        if self._told:
            return
        self._told = True
        asked = " or ".join(_NAMES[dim] for dim in self.dims)
        msg = (
            "a sample of %d x %d, of which the %s should be sharded, is there no multiple of %d, "
            "the rows of a latent's row: each rank that gets the result encodes the whole"
        )
        _log.warning(msg, *x.shape[-2:], asked, self.geometry.scale)

    def whole(self, method: str, x: Tensor, **kwargs: Any) -> Any:
        """A call of ``decode`` or ``encode`` on this rank alone."""
        with self._untiled():
            return self._methods[method](x, **kwargs)

    def along(self, method: str, x: Tensor, partition: Partition, **kwargs: Any) -> Any:
        """A call of ``decode`` or ``encode`` on shards, with the whole result on every rank."""
        call = ShardedCall(self._group, self._vae, self._region, "all")
        factor = self.geometry.scale if method == "encode" else 1
        with self._untiled():
            return call(lambda y: self._methods[method](y, **kwargs), x, partition, factor)

    def _sharded(
        self, method: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        whole, group = self._methods[method], self._group

        def asked(_: Partition | None) -> list[Any]:
            place = x.device.type  # the backend goes by it, and ranks of two would wait
            return [method, list(x.shape), x.dtype, place, [*map(_kind, args)], _kinds(kwargs)]

        def plan() -> Partition | None:
            refuse_gradients((x, args, kwargs))
            return self._plan(method, x, args, kwargs)

        partition = agreed(group, method, plan, asked)
        with self._untiled(), torch.no_grad():
            if partition is None:
                return self._by_those_who_get_it(method, lambda: whole(x, *args, **kwargs))

            def call(y: Tensor) -> Any:
                more, named = parts_beside(args, kwargs, partition, group.rank_in_group)
                return whole(y, *more, **named)

            factor = self.geometry.scale if method == "encode" else 1
            like = f"{method} {_kinds(kwargs)} {plain_settings(self._vae)}"
            return self._call(call, x, partition, factor, like)

    def _by_those_who_get_it(self, method: str, call: Callable[[], Any]) -> Any:
        """A call of the whole, which takes one rank as long as all, and all no messages."""
        idle = self._result == "first" and self._group.rank_in_group
        return agreed(self._group, method, (lambda: None) if idle else call)

    @contextmanager
    def _untiled(self) -> Iterator[None]:
        """Without tiles, which are not needed and would go by the size of a shard."""
        tiles = getattr(self._vae, "use_tiling", None)
        if tiles:
            self._vae.use_tiling = False
        try:
            yield
        finally:
            if tiles:
                self._vae.use_tiling = tiles


def _kind(value: Any) -> str:
    """What of an argument must be the same on all ranks."""
    shape = f" {tuple(value.shape)} {value.device.type}" if isinstance(value, Tensor) else ""
    return f"{type(value).__qualname__}{shape}"


def _kinds(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted((key, _kind(value)) for key, value in arguments.items())
