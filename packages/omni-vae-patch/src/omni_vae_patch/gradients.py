"""Autoencoders over ranks are for inference: nothing that asks for a gradient goes in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def refuse_gradients(value: object) -> None:
    """Check what a method is given.

    Raises:
        ParallelConfigError: A tensor asks for its gradient, which would not pass the ranks.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(value)):
        msg = (
            "an autoencoder over ranks is for inference, and the input asks for gradients; call "
            "under torch.no_grad(), or on one rank, after remove() of the handle"
        )
        raise ParallelConfigError(msg)
