"""Keeps what is changed while weights are gathered, on all ranks or on none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_hsdp.sharded_model import ShardedModel, ShardedParameter
from omni_parallel_state.checkpoints.together import together

_WHAT = "keep the changes of gathered(write=True)"


@contextmanager
def kept_changes(record: ShardedModel, shares: list[nn.Parameter]) -> Iterator[None]:
    """Put what is changed in the block into the shares at its end.

    Args:
        record: Of the model, gathered.
        shares: This rank's share of each parameter.

    Raises:
        ParallelError: The block, or a forward in it, failed on some rank. No rank keeps anything.
    """
    plain = [parameter.current for parameter in record.parameters]
    views = [parameter.data for parameter in plain]
    failure: Exception | None = None
    try:
        try:
            yield
        except Exception as caught:  # the others wait for this rank at the end of the block
            failure = caught
        with torch.inference_mode(False), torch.no_grad():
            _agree(record, failure)
            for parameter, share in zip(record.parameters, shares, strict=True):
                _write_back(record, parameter, share)
    finally:
        # They must point to what is gathered into: some change ``.data`` and not what is there.
        for gathered, view in zip(plain, views, strict=True):
            gathered.data = view


def _agree(record: ShardedModel, failure: Exception | None) -> None:
    """Raise on every rank of every copy if one of them cannot keep its changes."""
    copies = None if record.ranks is None else record.ranks.copies

    def of_this_copy() -> None:
        together(record.group, _WHAT, lambda: _check(record, failure))

    together(copies, _WHAT, of_this_copy)


def _check(record: ShardedModel, failure: Exception | None) -> None:
    if failure is not None:
        raise failure
    if record.gatherer is not None and record.gatherer.lost:
        msg = (
            "a forward failed inside gathered(write=True), which gave up the weights with their "
            "changes; make them again in a block in which none fails"
        )
        raise ParallelError(msg)
    for parameter in record.parameters:
        shape = parameter.current.shape
        if shape != parameter.shape:
            msg = f"{parameter.name} changed its shape; was {parameter.shape}, is {shape}"
            raise ParallelConfigError(msg)


def _write_back(record: ShardedModel, parameter: ShardedParameter, share: nn.Parameter) -> None:
    """Put this rank's rows of a changed parameter into its share."""
    from torch.distributed.tensor import DTensor

    if isinstance(share, DTensor):
        rows = parameter.rows(record.group.rank_in_group, record.shard)
        share.to_local().copy_(parameter.current.data[rows])
