"""Which rows each rank holds. Arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

from omni_group_coordinator import split_sizes

HEIGHT, WIDTH = -2, -1


@dataclass(frozen=True)
class Partition:
    """The rows of the coarsest feature map, one count for each rank; ranks without any idle.

    Rows are rows of the height, or columns of the width.

    Attributes:
        dim: `HEIGHT` or `WIDTH`.
        rows: Of each rank.
    """

    dim: int
    rows: tuple[int, ...]

    @property
    def active(self) -> int:
        """Ranks that have rows: the first ones."""
        return sum(1 for count in self.rows if count)

    @property
    def total(self) -> int:
        """Rows of the whole."""
        return sum(self.rows)

    def start(self, rank: int) -> int:
        """First row of a rank."""
        return sum(self.rows[:rank])

    def at(self, factor: int) -> list[int]:
        """Rows of each rank in a feature map that is so many times as fine."""
        return [count * factor for count in self.rows]


def partition(length: int, ranks: int, dim: int, least: int = 1) -> Partition:
    """Split rows evenly over as many ranks as can have the least number of rows.

    Args:
        length: Rows of the whole.
        ranks: Number of ranks.
        dim: Which side they are rows of.
        least: Rows that a rank needs to work at all.
    """
    active = max(1, min(ranks, length // least))
    return Partition(dim, (*split_sizes(length, active), *[0] * (ranks - active)))


def best_partition(
    height: int,
    width: int,
    ranks: int,
    dims: tuple[int, ...],
    least: int = 1,
    *,
    favoured: int | None = None,
) -> Partition:
    """The partition whose busiest rank has the smallest share of the whole.

    Where both sides are as good, it is the favoured one, else the longer one, whose halos are
    shorter.

    Args:
        height: Rows of the coarsest feature map.
        width: Its columns.
        ranks: Number of ranks.
        dims: The sides to choose from.
        least: Rows that a rank needs.
        favoured: A side, if any.
    """
    lengths = {HEIGHT: height, WIDTH: width}
    found = [partition(lengths[dim], ranks, dim, least) for dim in dims]
    return min(found, key=lambda one: (max(one.rows) / one.total, one.dim != favoured, -one.total))
