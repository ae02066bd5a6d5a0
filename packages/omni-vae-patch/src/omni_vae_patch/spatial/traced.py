"""Communication in a compiled decoder: operators that torch.compile does not look into.

So that steps are known there as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from omni_vae_patch.spatial.steps import Step, with_length


class Takes(Protocol):
    """A call that is under way."""

    def take(self, step: Step, x: Tensor) -> Sequence[Tensor]:
        """Do a step with this rank's tensor."""


running: WeakValueDictionary[str, Takes] = WeakValueDictionary()
"""Calls by the keys that compiled code knows."""


@torch.library.custom_op("omni_vae_patch::halo", mutates_args=())
def traced_halo(
    x: Tensor,
    key: str,
    dim: int,
    before: int,
    after: int,
    lengths: Sequence[int],
    rows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The halo of the shard of this key."""
    step = Step(dim, before, after, list(lengths), tuple(rows))
    first, last = running[key].take(step, x)
    return first.contiguous(), last.contiguous()  # as those without content below


@traced_halo.register_fake
def _(
    x: Tensor,
    key: str,
    dim: int,
    before: int,
    after: int,
    lengths: Sequence[int],
    rows: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return with_length(x, dim, rows[0]), with_length(x, dim, rows[1])


@torch.library.custom_op("omni_vae_patch::gather", mutates_args=())
def traced_gather(x: Tensor, key: str, dim: int, lengths: Sequence[int], total: int) -> Tensor:
    """The tensors of all ranks, joined, by the shard of this key."""
    (whole,) = running[key].take(Step(dim, None, None, list(lengths), (total,)), x)
    return whole.contiguous()


@traced_gather.register_fake
def _(x: Tensor, key: str, dim: int, lengths: Sequence[int], total: int) -> Tensor:
    return with_length(x, dim, total)
