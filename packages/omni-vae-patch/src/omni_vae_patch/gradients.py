"""Autoencoders over ranks are for inference: nothing that asks for a gradient goes in."""

from __future__ import annotations

import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.denoising.structure import tensors_in


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
