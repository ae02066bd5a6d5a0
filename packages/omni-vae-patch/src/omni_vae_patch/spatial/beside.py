"""Maps that an autoencoder is given beside its latent or sample; a rank takes its part of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.spatial.partition import Partition

_LEAST = 4  # dimensions: batch, channels, height and width


def check_beside(
    args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, partition: Partition, where: str
) -> None:
    """Check that each map among the arguments shows the same as the first one, finer or not.

    Args:
        args: Beside the latent or sample.
        kwargs: Likewise.
        x: The latent or sample.
        partition: How it is divided.
        where: The method, for messages.

    Raises:
        ParallelConfigError: One has other sides, and a rank's part of it is not known.
    """
    height, width = x.shape[-2:]

    def check(value: Any) -> None:
        if not _is_map(value):
            return
        rows, columns = value.shape[-2:]
        if value.shape[partition.dim] % partition.total or rows * width != columns * height:
            msg = (
                f"{where} is given a tensor of shape {tuple(value.shape)} beside one of "
                f"{height} x {width}, and it is not known which part of it a rank needs; legal: "
                f"{partition.total} rows or columns, or so many times that, where the first one "
                "is divided, and as much along the other side"
            )
            raise ParallelConfigError(msg)

    _each(check, args, kwargs)


def parts_beside(
    args: tuple[Any, ...], kwargs: dict[str, Any], partition: Partition, rank: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rank, each map among them cut to its rows.

    Args:
        args: Checked by `check_beside`.
        kwargs: Likewise.
        partition: Rows of the coarsest map.
        rank: Whose part; one without rows takes that of the first, for its kind alone.
    """
    dim, rows = partition.dim, partition.rows[rank]
    start = partition.start(rank) if rows else 0
    rows = rows or partition.rows[0]

    def part(value: Any) -> Any:
        if not _is_map(value):
            return value
        factor = value.shape[dim] // partition.total
        return value.narrow(dim, start * factor, rows * factor).contiguous()

    return _each(part, args, kwargs)


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= _LEAST


def _each(
    do: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(do(arg) for arg in args), {key: do(value) for key, value in kwargs.items()}
