"""The words for the dimensions of a layout, fixed once."""

from __future__ import annotations

from enum import StrEnum

from omni_group_coordinator import ParallelConfigError


class Dim(StrEnum):
    """A dimension along which ranks are counted. Plain strings work wherever a Dim does.

    dp to tp multiply to the world (sp is ring * ulysses). fs, replicate and vae lie over the same
    ranks a second time, as runs of neighbours; dit and world are all ranks.
    """

    DP = "dp"
    """Replicas that work on different samples."""
    CFG = "cfg"
    """Ranks that share the guidance branches of one sample."""
    PP = "pp"
    """Stages of layers."""
    SP = "sp"
    """Ranks that share the sequence of one sample: ring * ulysses."""
    RING = "ring"
    """Sequence parallelism by passing keys and values round; the outer part of sp."""
    ULYSSES = "ulysses"
    """Sequence parallelism by exchanging heads; the inner, contiguous part of sp."""
    TP = "tp"
    """Ranks that share the weights of each layer; the fastest dimension."""
    FS = "fs"
    """Fully shard: ranks over which weights are sharded and gathered layer by layer."""
    REPLICATE = "replicate"
    """Ranks that hold the same shard when there are several fully-shard groups."""
    VAE = "vae"
    """Ranks that share one image in the VAE."""
    DIT = "dit"
    """Ranks that run the transformer."""
    WORLD = "world"
    """All ranks of the layout."""


GRID_DIMS = (Dim.DP, Dim.CFG, Dim.PP, Dim.RING, Dim.ULYSSES, Dim.TP)
"""The dimensions that multiply to the world, slowest first in the default order."""

_SHARD = "shard"  # what torch calls fs in the (replicate, shard) mesh of HSDP


def parse_dims(names: str) -> tuple[Dim, ...]:
    """Dimensions from ``"ulysses"`` or ``"tp-dp"``; ``"shard"`` is torch's word for fs.

    Raises:
        ParallelConfigError: An unknown or repeated name.
    """
    tokens = tuple(Dim.FS.value if name == _SHARD else name for name in names.split("-"))
    unknown = [name for name in tokens if name not in tuple(Dim)]
    if unknown or len(set(tokens)) != len(tokens):
        what = f"the unknown dimension {unknown[0]!r}" if unknown else "a dimension twice"
        msg = f"{names!r} names {what}; legal: {', '.join(Dim)}, or several joined by '-'"
        raise ParallelConfigError(msg)
    return tuple(Dim(name) for name in tokens)
