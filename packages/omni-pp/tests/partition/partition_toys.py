"""Small models of our own, which can be cut or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ToyBlock(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("scale", torch.rand(width) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale + self.shift


class Toy(nn.Module):
    """An embedder, blocks, and a head."""

    block: type[nn.Module] = ToyBlock

    def __init__(self, count: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(self.block() for _ in range(count))
        self.head = nn.Linear(8, 4)

    def forward(
        self, x: Tensor, scale: float = 1.0, controlnet_block_samples: Any = None
    ) -> Tensor:
        x = self.embed(x) * scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TwoLists(Toy):
    def __init__(self) -> None:
        super().__init__(2)
        self.single_blocks = nn.ModuleList(ToyBlock() for _ in range(3))


class Plain(TwoLists):
    """All that may be in a loop: what is set anew before the block, and what follows it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = x * 2
        for i, block in enumerate(self.blocks):  # noqa: B007
            if x.ndim > 5:  # noqa: SIM108
                scaled = x / 2
            else:
                scaled = x * y.mean()
            x = block(scaled)
            x = x + y * 2
        length = x.shape[0]
        z = torch.cat([x, x], dim=0)
        for block in self.single_blocks:
            z = block(z)
        x = z[:length]
        return self.head(x)


class Checkpointed(Toy):
    """As models are that can be trained."""

    gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index, block in enumerate(self.blocks):  # noqa: B007
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return self.head(x)


class OddName(Toy):
    """One list of an unusual name, between two that are no trunk."""

    def __init__(self) -> None:
        super().__init__(0)
        del self.blocks
        self.strata = nn.ModuleList(ToyBlock() for _ in range(3))
        self.mixed = nn.ModuleList([nn.Linear(8, 8), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for module in self.mixed:
            x = module(x)
        for stratum in self.strata:
            x = stratum(x)
        return self.head(x)


class Inherited(Toy):
    """As FSDP makes it: another class with the forward of its base."""


def toy_input() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
