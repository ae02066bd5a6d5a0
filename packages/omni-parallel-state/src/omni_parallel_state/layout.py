"""Which rank is where: the layout of a world of ranks as a pure value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import lcm, prod
from typing import Self, TypedDict, Unpack

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state._layout_checks import check_hsdp, check_vae, world_error
from omni_parallel_state._legal_values import check_degree, product_text, ranks_text
from omni_parallel_state.dims import GRID_DIMS, Dim, parse_dims
from omni_parallel_state.rank_generator import (
    DEFAULT_ORDER,
    generate_masked_orthogonal_rank_groups,
    lattice,
    parse_order,
    strides_of,
)

_REST = "rest"  # what is left of the world beside an overlay


class Degrees(TypedDict, total=False):
    """The optional arguments of `ParallelLayout` beside dp."""

    cfg: int
    pp: int
    ring: int
    ulysses: int
    tp: int
    fs: int
    replicate: int
    vae: int
    order: str


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees, order, and all the arithmetic of ranks. Needs no process group.

    In the default order, rank = tp + TP * (sp + SP * (pp + PP * (cfg + CFG * dp))), and inside a
    sequence-parallel group sp = ring * ULYSSES + ulysses: Ulysses peers are neighbours in the
    sequence, Ring peers are ULYSSES apart. A degree of 1 means off.

    fs, replicate and vae don't multiply the world. They lie over the ranks a second time: runs of
    `fs` neighbours share sharded weights, ranks `fs` apart in blocks of fs * replicate hold the
    same shard, runs of `vae` neighbours share an image in the VAE. If every other degree is 1,
    there is nothing to lie over: dp then becomes the least common multiple of fs * replicate and
    vae, so that fs=4, replicate=2 alone is a world of 8 ranks.

    Raises:
        ParallelConfigError: A degree below 1, an impossible order, an overlay that does not divide
            the world, or a weight-sharding group that would mix ranks with different weights.
    """

    dp: int = 1
    """Replicas that work on different samples."""
    cfg: int = 1
    """Ranks that share the guidance branches of one sample."""
    pp: int = 1
    """Pipeline stages."""
    ring: int = 1
    """Outer sequence parallelism (Ring attention)."""
    ulysses: int = 1
    """Inner sequence parallelism (Ulysses attention)."""
    tp: int = 1
    """Tensor parallelism; its peers are neighbours in rank."""
    fs: int = field(default=1, kw_only=True)
    """Fully shard: how many ranks share one copy of the weights (the shard size of HSDP)."""
    replicate: int = field(default=1, kw_only=True)
    """How many sharded copies of the weights form one HSDP mesh."""
    vae: int = field(default=1, kw_only=True)
    """How many ranks share one image in the VAE."""
    order: str = field(default=DEFAULT_ORDER, kw_only=True)
    """Dimensions from fastest to slowest: tp, sp, pp, cfg and dp joined by ``-``."""

    def __post_init__(self) -> None:
        for name in (*GRID_DIMS, Dim.FS, Dim.REPLICATE, Dim.VAE):
            check_degree(name, getattr(self, name))
        order = parse_order(self.order, {n: getattr(self, n) for n in DEFAULT_ORDER.split("-")})
        object.__setattr__(self, "order", "-".join(order))
        if self.world_size == 1:
            object.__setattr__(self, "dp", lcm(self.fs * self.replicate, self.vae))
        strides = self._strides()
        weights = {dim.value: strides[dim] for dim in (Dim.TP, Dim.PP) if getattr(self, dim) > 1}
        check_hsdp(self.world_size, self.fs, self.replicate, weights)
        check_vae(self.world_size, self.vae)

    @classmethod
    def for_world(
        cls, world_size: int, *, dp: int | None = None, **degrees: Unpack[Degrees]
    ) -> Self:
        """A layout of exactly `world_size` ranks.

        Args:
            world_size: Number of ranks to lay out.
            dp: Replicas; None takes all ranks that the other degrees leave.
            degrees: The other arguments of `ParallelLayout`.

        Raises:
            ParallelConfigError: The degrees do not multiply to the world; names the nearest that
                do. Also what the constructor raises.
        """
        given = dict(degrees)
        if "sp" in given:
            msg = f"sp={given['sp']} is ring * ulysses; pass ring= and ulysses= instead"
            raise ParallelConfigError(msg)
        check_degree("world_size", world_size)
        asked = {dim.value: check_degree(dim, given.get(dim, 1)) for dim in GRID_DIMS[1:]}
        rest = prod(asked.values())
        if dp is None and world_size % rest:
            raise world_error(world_size, asked, exact=False)
        layout = cls(dp=world_size // rest if dp is None else dp, **degrees)
        if layout.world_size != world_size:
            overlay = {"fs": layout.fs, "replicate": layout.replicate, "vae": layout.vae}
            set_by_overlay = rest == 1 and dp in {None, 1} and layout.world_size > 1
            asked = overlay if set_by_overlay else {"dp": layout.dp, **asked}
            raise world_error(world_size, asked, exact=True)
        return layout

    @property
    def sp(self) -> int:
        """Ranks that share a sequence: ring * ulysses."""
        return self.ring * self.ulysses

    @property
    def world_size(self) -> int:
        """Ranks of the layout: dp * cfg * pp * ring * ulysses * tp."""
        return prod(getattr(self, dim) for dim in GRID_DIMS)

    def degree(self, dim: str) -> int:
        """Ranks in each group of a dimension, or of several (``"tp-dp"``)."""
        sizes, _ = self._select(dim)
        return prod(sizes.values())

    def groups(self, dim: str) -> tuple[tuple[int, ...], ...]:
        """All groups of a dimension, or of several (``"tp-dp"``).

        Every rank is in exactly one of them; they ascend in their first rank, and ranks ascend
        inside each. Cost: one integer per rank of the world.

        Raises:
            ParallelConfigError: An unknown dimension, or dimensions that don't go together.
        """
        sizes, grid = self._select(dim)
        mask = [name in sizes for name in grid]
        found = generate_masked_orthogonal_rank_groups(self.world_size, list(grid.values()), mask)
        return tuple(tuple(group) for group in found)

    def group_of(self, rank: int, dim: str) -> tuple[int, ...]:
        """The group of one rank in a dimension, without making the others."""
        sizes, grid = self._select(dim)
        return tuple(sorted(self._block(rank, grid, list(sizes))))

    def grid_of(self, rank: int, dims: Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from one rank only in `dims`, as an array in row-major order.

        Args:
            rank: Global rank.
            dims: Dimensions of the array, slowest first, for example ``("replicate", "fs")``.

        Returns:
            As many ranks as the degrees of `dims` multiply to; the last dimension runs fastest.

        Raises:
            ParallelConfigError: As for `groups`; also a dimension that stands twice.
        """
        _, grid = self._select("-".join(dims))
        names = [name for dim in dims for name in reversed(self._select(dim)[0])]
        return tuple(self._block(rank, grid, names[::-1]))

    def coordinates(self, rank: int) -> dict[str, int]:
        """The index of a rank in each dimension, overlays included.

        Raises:
            ParallelConfigError: The layout has no such rank.
        """
        self._check_rank(rank)
        found = {}
        for grid in self._grids():
            strides = strides_of(list(grid.values()))
            for (name, size), stride in zip(grid.items(), strides, strict=True):
                found[name] = rank // stride % size
        found["sp"] = found["ring"] * self.ulysses + found["ulysses"]
        return {dim.value: found[dim] for dim in Dim}

    def rank_at(
        self,
        *,
        dp: int = 0,
        cfg: int = 0,
        pp: int = 0,
        sp: int = 0,
        ring: int = 0,
        ulysses: int = 0,
        tp: int = 0,
    ) -> int:
        """The rank with these coordinates, the inverse of `coordinates`.

        Raises:
            ParallelConfigError: A coordinate outside its dimension, or sp beside its two parts.
        """
        index = {"dp": dp, "cfg": cfg, "pp": pp, "sp": sp, "tp": tp}
        if ring or ulysses:
            if sp:
                msg = f"sp={sp} is ring * ulysses; legal: either sp, or ring and ulysses"
                raise ParallelConfigError(msg)
            index |= {"ring": ring, "ulysses": ulysses}
        for name, value in index.items():
            if not 0 <= value < self.degree(name):
                last = self.degree(name) - 1
                msg = f"{name}={value} is no coordinate here; legal {name}: 0 to {last}"
                raise ParallelConfigError(msg)
        return sum(value * self._strides()[name] for name, value in index.items())

    def sequence_position(self, rank: int) -> int:
        """Which shard of the sequence a rank holds: 0 is the first of `sp` shards."""
        return self.coordinates(rank)["sp"]

    def describe(self) -> str:
        """A table for people: each dimension's degree, number of groups, and first group."""
        grid = {dim.value: int(getattr(self, dim)) for dim in GRID_DIMS}
        lines = [f"{ranks_text(self.world_size)}: {product_text(grid)}; order {self.order}"]
        for dim in Dim:
            first = self.group_of(0, dim)
            shown = ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
            count = self.world_size // len(first)
            lines.append(f"{dim:<9} degree {len(first):>4}, {count:>4} groups, first: {shown}")
        return "\n".join(lines)

    def _grids(self) -> tuple[dict[str, int], ...]:
        """The ways in which the world is cut up; each gives sizes, the fastest first."""
        world, main = self.world_size, dict[str, int]()
        for name in self.order.split("-"):
            for part in ("ulysses", "ring") if name == "sp" else (name,):
                main[part] = getattr(self, part)
        block = self.fs * self.replicate
        hsdp = {"fs": self.fs, "replicate": self.replicate, _REST: world // block}
        vae = {"vae": self.vae, _REST: world // self.vae}
        return main, hsdp, vae, {"dit": world}, {"world": world}

    def _strides(self) -> dict[str, int]:
        grid = self._grids()[0]
        strides = dict(zip(grid, strides_of(list(grid.values())), strict=True))
        return {**strides, "sp": strides["ulysses"]}

    def _select(self, dims: str) -> tuple[dict[str, int], dict[str, int]]:
        """Sizes of the named dimensions, fastest first, and the grid that they belong to."""
        names: set[str] = set()
        for dim in parse_dims(dims):
            parts = {"ulysses", "ring"} if dim is Dim.SP else {dim.value}
            if names & parts:
                msg = f"{dims!r} counts {dim} twice; legal: either sp, or ring and ulysses"
                raise ParallelConfigError(msg)
            names |= parts
        for grid in self._grids():
            if names <= set(grid):
                return {name: size for name, size in grid.items() if name in names}, grid
        msg = (
            f"{dims!r} mixes dimensions that cut the world differently; legal together: "
            f"{', '.join((*GRID_DIMS, 'sp'))}; or fs and replicate; vae, dit and world stand alone"
        )
        raise ParallelConfigError(msg)

    def _block(self, rank: int, grid: dict[str, int], names: Sequence[str]) -> list[int]:
        """The ranks that differ from `rank` in `names`, the first of which runs fastest."""
        self._check_rank(rank)
        stride = dict(zip(grid, strides_of(list(grid.values())), strict=True))
        start = rank - sum(rank // stride[name] % grid[name] * stride[name] for name in names)
        points = lattice([grid[name] for name in names], [stride[name] for name in names])
        return [start + point for point in points]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            msg = f"rank {rank} is not in the layout; legal here: 0 to {self.world_size - 1}"
            raise ParallelConfigError(msg)
