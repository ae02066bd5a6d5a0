"""Which kernels torch takes, and so how they round, depends on ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from omni_hsdp.sharded_model import ShardedParameter


class GradFlags:
    """Gives weights the flag ``requires_grad`` of the originals for the time of a call.

    A matrix product takes another path for weights that require a gradient, even where none is
    recorded. Shares require none, so gathered weights get the flag in calls that record nothing.

    Args:
        parameters: What is sharded.
        whole: What is not, with the flag that it had.
    """

    def __init__(
        self, parameters: Iterable[ShardedParameter], whole: Mapping[nn.Parameter, bool]
    ) -> None:
        self._blocks: dict[str, list[ShardedParameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                self._blocks.setdefault(parameter.block, []).append(parameter)
        self._whole = whole

    def set(self, block: str) -> None:
        """Set the flags of what was gathered for a block; for none, those of what is whole too."""
        wanted = not torch.is_grad_enabled()
        for parameter in self._blocks.get(block, ()):
            _set(parameter.current, wanted)
        if not block:
            self._set_whole(wanted)

    def clear(self) -> None:
        """Have whole parameters require no gradient between calls, like all others."""
        self._set_whole(False)

    def _set_whole(self, wanted: bool) -> None:
        for parameter, required in self._whole.items():
            if required:
                _set(parameter, wanted)


def _set(parameter: nn.Parameter, wanted: bool) -> None:
    if parameter.requires_grad is not wanted and not parameter.is_inference():
        parameter.requires_grad_(wanted)
