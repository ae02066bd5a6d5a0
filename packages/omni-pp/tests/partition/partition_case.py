"""What a small model of diffusers is tested with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PartitionCase:
    """A model, its lists of blocks, and the arguments of a call."""

    build: Callable[[], nn.Module]
    call: Callable[[], dict[str, Any]]
    lists: tuple[tuple[str, int], ...]


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def randomised(build: Callable[[], nn.Module], seed: int = 7) -> nn.Module:
    """The model with weights that all count: fresh ones are zero in places."""
    torch.manual_seed(seed)
    model = build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def valid(text: int, *lengths: int) -> Tensor:
    return torch.arange(text) < torch.tensor(lengths)[:, None]
