"""Writes down what a sharded model gathers, computes and holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Step(nn.Module):
    """A block whose size tells which one it is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(4, 8 * (number + 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).sum(-1, keepdim=True)


class Stairs(nn.Module):
    """Blocks of different sizes, which run in an order of their own."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step(number) for number in range(count))
        self.head = nn.Linear(4, 2, bias=False)
        self.order = list(range(count))
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            if number == self.fails_at:
                raise ArithmeticError
            x = self.blocks[number](x)
        return self.head(x)


def stairs(count: int = 4) -> Stairs:
    """The same on every rank."""
    torch.manual_seed(2)
    return Stairs(count).eval()


@contextmanager
def events_of(model: Stairs, ranks: int) -> Iterator[list[str]]:
    """What happens in the block: ``"g2"`` starts to gather block 2, ``"c2"`` computes it.

    ``"g"`` is what is in no block.
    """
    found: list[str] = []
    sizes = {4 * 8 * (step.number + 2) // ranks: str(step.number) for step in model.blocks}
    gather = dist.all_gather_single

    def watched(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append("g" + sizes.get(given.numel(), ""))
        return gather(output, given, *args, **kwargs)

    def computes(module: Any, _: Any) -> None:
        found.append(f"c{module.number}")

    hooks = [step.register_forward_pre_hook(computes, prepend=True) for step in model.blocks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_single", watched)
        yield found
    for hook in hooks:
        hook.remove()


def held(model: nn.Module) -> str:
    """Which blocks hold more than a share now, in numbers."""
    return "".join(
        str(module.number)
        for module in model.modules()
        if isinstance(module, Step) and not isinstance(module.linear.weight, DTensor)
    )
