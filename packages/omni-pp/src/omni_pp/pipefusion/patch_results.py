"""The results of calls in patches, which are handed out before they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from omni_parallel_state.denoising.structure import Plain, rebuild, tensor_specs
from omni_pp.pipefusion.patch_values import Arriving, Ledger
from omni_pp.pipefusion.patchwise import PatchwiseTensor
from omni_pp.pipefusion.token_layout import TokenLayout
from omni_pp.stages.micro_batches import Delivery
from omni_pp.stages.staged_denoiser import Piece, StagedDenoiser


def hand_out(
    ledger: Ledger, layout: TokenLayout, plain: Plain, pieces: Sequence[Piece], delivery: Delivery
) -> Any:
    """The result of a call in patches, which arrive one by one.

    Args:
        ledger: What is still to be computed of earlier ones; it is done now, for these are here.
        layout: How tokens lie in the result.
        plain: Everything about the result but its elements; it has one tensor.
        pieces: The patches.
        delivery: Brings them.
    """
    ledger.arrive = delivery.arrive
    ledger.settle()
    ((shape, dtype),) = tensor_specs(plain)
    like = torch.empty(shape, dtype=dtype, device="meta")

    def take(index: int) -> Tensor:
        StagedDenoiser.take_result(pieces[index])
        if pieces[index].value is None:  # a stage failed, which all ranks hear at one place
            lost = layout.patch_shape(like.shape, index)
            return torch.zeros(lost, dtype=dtype, device=delivery.device)
        return cast("Tensor", pieces[index].value)

    takes = [partial(take, index) for index in range(layout.patches)]
    values = Arriving(ledger, layout, takes)
    return rebuild(plain, iter([PatchwiseTensor(values, like, delivery.device)]))
