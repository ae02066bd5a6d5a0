"""Whether all ranks have the same weights: a checksum of each, compared when it is applied."""

from __future__ import annotations

from itertools import chain, zip_longest

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from omni_group_coordinator import GroupCoordinator, RankMismatchError
from omni_vae_patch.agreement import Attempt, settle

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Mark = list[str | int]
"""Of a weight: its name, dtype and shape, and a checksum of its bits."""


def check_weights(vae: nn.Module, group: GroupCoordinator) -> None:
    """Compare parameters and buffers over ranks: a checksum of each travels, and no weight.

    Ranks with other weights would each decode their rows of another picture.

    Args:
        vae: The same autoencoder on every rank.
        group: The ranks.

    Raises:
        RankMismatchError: On every rank: names the first weight that differs.
    """
    what = f"comparing the weights of {type(vae).__name__}"
    attempt = Attempt.of(lambda: marks_of(vae))
    said = settle(group, what, attempt, attempt.value, asks=True) or []
    for marks in zip_longest(*said):
        ranks = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if ranks:
            _refuse(vae, group, list(marks), ranks[0])


def _refuse(vae: nn.Module, group: GroupCoordinator, marks: list[Mark | None], rank: int) -> None:
    first, other = marks[0], marks[rank]
    if first is None or other is None or first[:-1] != other[:-1]:
        how = f"rank {group.ranks[0]} has {_said(first)}, rank {group.ranks[rank]} {_said(other)}"
    else:
        how = (
            f"{first[0]!r} is the first of other values on rank {group.ranks[rank]} than on rank "
            f"{group.ranks[0]}"
        )
    msg = (
        f"the weights of {type(vae).__name__} differ between the ranks, of which each would decode "
        f"its rows of another picture: {how}; load the same weights on every rank"
    )
    raise RankMismatchError(msg)


def _said(mark: Mark | None) -> str:
    return "no more weights" if mark is None else " ".join(map(str, mark[:-1]))


def marks_of(vae: nn.Module) -> list[Mark]:
    """A mark of each parameter and buffer; one transfer from the device for all checksums."""
    weights = list(chain(vae.named_parameters(), vae.named_buffers()))
    sums = [_checksum(weight.detach()) for _, weight in weights]
    known = [one for one in sums if one is not None]
    numbers = iter(torch.stack(known).tolist() if known else [])
    return [
        [name, str(weight.dtype), str(tuple(weight.shape)), 0 if one is None else next(numbers)]
        for (name, weight), one in zip(weights, sums, strict=True)
    ]


def _checksum(weight: Tensor) -> Tensor | None:
    """A sum of the bits in which each row has a weight of its own; ``None`` if they are not here.

    Not of weights that are sharded, packed or without content: these are others' affair.
    """
    if weight.is_meta or is_traceable_wrapper_subclass(weight):
        return None
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    rows = weight.shape[0] if weight.ndim else 1
    if not weight.numel() or weight.itemsize not in _BITS:
        return torch.zeros((), dtype=torch.int64, device=weight.device)
    bits = weight.contiguous().view(_BITS[weight.itemsize]).reshape(rows, -1)
    order = torch.arange(1, rows + 1, device=weight.device)
    return (bits.sum(1, dtype=torch.int64) * order).sum()
