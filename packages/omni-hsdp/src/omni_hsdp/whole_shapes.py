"""Lets a sharded model show the shapes of its whole weights, to code that adds layers to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from omni_hsdp.fsdp_internals import without_state_hooks
from omni_hsdp.sharded_model import ShardedModel, ShardedParameter, record_of


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[nn.Module]:
    """Show weights with their whole shapes and without their values, in a ``with`` block.

    Adapters are loaded in it: peft takes sizes, device and dtype of its layers from the weights
    that it wraps, and would take those of a rank's share. Takes no memory and communicates
    nothing; ``with gathered(model):`` serves as well, and gathers everything.

    Args:
        model: A sharded model. In the block its weights read as NaN and cannot be written to; it
            is not called in it.

    Raises:
        ParallelConfigError: The model is not sharded.
    """
    from torch.distributed.tensor import DTensor

    record = record_of(model)
    shown: list[tuple[ShardedParameter, nn.Parameter, nn.Parameter]] = []
    with torch.inference_mode(False), torch.no_grad():
        for parameter in record.parameters:
            share = parameter.current
            if isinstance(share, DTensor):
                shown.append((parameter, share, _outline(record, parameter, share)))
    try:
        for parameter, _, outline in shown:
            parameter.put(outline)
        with without_state_hooks(model):
            yield model
    finally:
        for parameter, share, outline in shown:
            if parameter.current is outline:
                parameter.put(share)


def _outline(
    record: ShardedModel, parameter: ShardedParameter, share: nn.Parameter
) -> nn.Parameter:
    """A parameter as it is when it is gathered, of one number in memory."""
    dtype = record.cast_to or share.dtype
    one = torch.full((1,) * len(parameter.shape), torch.nan, dtype=dtype, device=record.device)
    return nn.Parameter(one.expand(parameter.shape), requires_grad=False)
