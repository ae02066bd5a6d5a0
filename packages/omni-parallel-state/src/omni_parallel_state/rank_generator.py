"""Rank groups by arithmetic: which ranks differ only in the chosen dimensions.

A layout numbers its ranks in a mixed radix: with sizes n0, n1, n2, … (fastest first),
rank = i0 + n0 * (i1 + n1 * (i2 + …)). The groups of some dimensions are then the sets of ranks
whose other indices agree. No process group and no torch is needed for any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import mul

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state._legal_values import check_degree, divisors, listing, nearest

DEFAULT_ORDER = "tp-sp-pp-cfg-dp"
"""Dimensions from the fastest, whose peers are neighbours, to the slowest."""

ORDER_TOKENS = tuple(DEFAULT_ORDER.split("-"))


def strides_of(sizes: Sequence[int]) -> list[int]:
    """How far apart neighbours of each dimension are in rank, for sizes given fastest first."""
    return list(accumulate(sizes, mul, initial=1))[: len(sizes)]


def lattice(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Every sum of index * stride, the first dimension running fastest."""
    points = [0]
    for size, stride in zip(sizes, strides, strict=True):
        points = [point + index * stride for index in range(size) for point in points]
    return points


def generate_masked_orthogonal_rank_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Groups of the ranks that differ only in the masked dimensions.

    Example: 8 ranks of sizes [2, 2, 2] with mask [False, True, False] give
    [[0, 2], [1, 3], [4, 6], [5, 7]].

    Args:
        world_size: Number of ranks, the product of `parallel_size`.
        parallel_size: Size of each dimension, the fastest first.
        mask: True for the dimensions that vary inside a group.

    Returns:
        Groups in ascending order of their first rank; inside a group, ranks ascend.

    Raises:
        ParallelConfigError: The sizes do not multiply to the world size, or the mask has another
            length than the sizes.
    """
    for index, size in enumerate(parallel_size):
        check_degree(f"parallel_size[{index}]", size)
    if len(parallel_size) != len(mask):
        msg = f"mask has {len(mask)} entries for the {len(parallel_size)} sizes {parallel_size}"
        raise ParallelConfigError(msg)
    if prod(parallel_size) != world_size:
        msg = (
            f"parallel_size={list(parallel_size)} multiplies to {prod(parallel_size)}, "
            f"but world_size={world_size}; the nearest legal world_size is {prod(parallel_size)}"
        )
        raise ParallelConfigError(msg)
    dims = list(zip(parallel_size, strides_of(parallel_size), mask, strict=True))
    inside = lattice([n for n, _, inner in dims if inner], [s for _, s, inner in dims if inner])
    starts = lattice([n for n, _, inner in dims if not inner], [s for _, s, inn in dims if not inn])
    return [[start + offset for offset in inside] for start in starts]


def parse_order(order: object, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The dimensions of an order string, fastest first; missing ones of size 1 come last.

    Args:
        order: Names joined by ``-``, each of tp, sp, pp, cfg and dp at most once.
        sizes: Size of each dimension.

    Raises:
        ParallelConfigError: An unknown or repeated name, or a dimension of several ranks that the
            order leaves out.
    """
    tokens = tuple(order.split("-")) if isinstance(order, str) else (repr(order),)
    unknown = [token for token in tokens if token not in ORDER_TOKENS]
    if unknown or len(set(tokens)) != len(tokens):
        what = f"the unknown dimension {unknown[0]!r}" if unknown else "a dimension twice"
        msg = (
            f"order={order!r} names {what}; legal: {', '.join(ORDER_TOKENS)}, each once, joined by "
            f"'-', fastest first, for example {DEFAULT_ORDER!r}"
        )
        raise ParallelConfigError(msg)
    missing = tuple(token for token in ORDER_TOKENS if token not in tokens)
    for token in missing:
        if sizes[token] > 1:
            msg = (
                f"order={order!r} leaves out {token}, which has {sizes[token]} ranks; "
                f"nearest legal order: {'-'.join((*tokens, *missing))!r}"
            )
            raise ParallelConfigError(msg)
    return tokens + missing


class RankGenerator:
    """Rank groups of any dimension of a layout of five dimensions.

    Args:
        tp: Ranks that share each layer's weights (tensor parallelism).
        sp: Ranks that share a sequence (sequence parallelism).
        pp: Pipeline stages.
        cfg: Ranks that share the guidance branches.
        dp: Replicas that work on different samples.
        fs: Ranks over which weights are fully sharded. Such groups are runs of consecutive ranks
            that lie over the other dimensions and do not multiply the world.
        order: Dimensions from fastest to slowest.
        rank_offset: Added to every rank, for a layout that does not start at rank 0.

    Raises:
        ParallelConfigError: A degree below 1, an impossible order or offset, or an `fs` that does
            not divide the number of ranks.
    """

    def __init__(
        self,
        tp: int,
        sp: int,
        pp: int,
        cfg: int,
        dp: int,
        fs: int = 1,
        order: str = "tp-sp-pp-cfg-dp",
        rank_offset: int = 0,
    ) -> None:
        self.sizes = {"tp": tp, "sp": sp, "pp": pp, "cfg": cfg, "dp": dp}
        for name, size in {**self.sizes, "fs": fs}.items():
            check_degree(name, size)
        self.fs = fs
        self.rank_offset = rank_offset
        self.world_size = prod(self.sizes.values())
        self.order = "-".join(parse_order(order, self.sizes))
        if rank_offset < 0:
            msg = f"rank_offset={rank_offset} is negative; the nearest legal value is 0"
            raise ParallelConfigError(msg)
        if self.world_size % fs:
            legal = listing(nearest(divisors(self.world_size), fs))
            msg = f"fs={fs} does not divide the {self.world_size} ranks; nearest legal fs: {legal}"
            raise ParallelConfigError(msg)

    def get_mask(self, order: str, token: str) -> list[bool]:
        """Which dimensions of `order` the token names.

        Args:
            order: Dimensions joined by ``-``.
            token: One dimension, or several joined by ``-``.

        Raises:
            ParallelConfigError: The token names a dimension that the order has not.
        """
        dims, wanted = order.split("-"), token.split("-")
        unknown = [name for name in wanted if name not in dims]
        if unknown:
            msg = f"{token!r} names the dimension {unknown[0]!r}; legal here: {', '.join(dims)}, fs"
            raise ParallelConfigError(msg)
        return [name in wanted for name in dims]

    def get_ranks(self, token: str, independent_ranks: bool = False) -> list[list[int]]:
        """The groups of ranks that differ only in the named dimensions.

        Args:
            token: One dimension (``"sp"``), several (``"tp-dp"``), or ``"fs"``.
            independent_ranks: True gives runs of consecutive ranks of the same size instead,
                whatever the order, as ``"fs"`` always does.

        Raises:
            ParallelConfigError: An unknown dimension.
        """
        if token == "fs" or independent_ranks:
            length = self.fs if token == "fs" else self._degree(token)
            sizes, mask = [length, self.world_size // length], [True, False]
        else:
            sizes = [self.sizes[name] for name in self.order.split("-")]
            mask = self.get_mask(self.order, token)
        groups = generate_masked_orthogonal_rank_groups(self.world_size, sizes, mask)
        return [[rank + self.rank_offset for rank in group] for group in groups]

    def _degree(self, token: str) -> int:
        chosen = zip(self.order.split("-"), self.get_mask(self.order, token), strict=True)
        return prod(self.sizes[name] for name, inside in chosen if inside)
