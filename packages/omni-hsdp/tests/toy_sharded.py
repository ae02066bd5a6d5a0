"""Small models, and helpers of the tests in which ranks share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from omni_hsdp import HSDPInferenceConfig
from omni_parallel_state import ParallelLayout, ParallelState

WIDTH = 6


class Block(nn.Module):
    """One block; five rows of its second weight are shared by any number of ranks unevenly."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, width * 2 + 1)
        self.down = nn.Linear(width * 2 + 1, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Toy(nn.Module):
    """A stem, blocks, and a head."""

    def __init__(self, blocks: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.register_buffer("phase", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * self.scale + self.phase
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def toy(blocks: int = 3, seed: int = 3, width: int = WIDTH) -> Toy:
    """The same model on every rank."""
    torch.manual_seed(seed)
    return Toy(blocks, width).eval()


def seeded(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def config(shard: int = -1, replicate: int = 1, **more: Any) -> HSDPInferenceConfig:
    """A configuration that casts nothing."""
    given = {"param_dtype": None} | more
    return HSDPInferenceConfig(True, replicate, shard, **given)


@contextmanager
def sharing(shard: int, replicate: int = 1) -> Iterator[ParallelState]:
    """A state in which so many ranks share weights, current in the block."""
    state = ParallelState(ParallelLayout(fs=shard, replicate=replicate))
    with state.use(), torch.no_grad():
        yield state
    state.destroy()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in tensors_of(item)]


def equal(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same bit for bit."""
    pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
    return bool(pairs) and all(a.dtype is b.dtype and torch.equal(a, b) for a, b in pairs)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What `remove_hsdp` has to give back: classes, values, flags, attributes and hooks."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "parameters": {
            name: (id(p), type(p), p.requires_grad, p.dtype, p.detach().clone())
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: {key: len(v) for key, v in vars(module).items() if "_hooks" in key and v}
            for name, module in model.named_modules()
        },
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two snapshots differ."""
    found = []
    for kind, olds in before.items():
        if list(olds) != list(after[kind]):
            found.append(f"{kind}: other names")
        for name in olds.keys() & after[kind].keys():
            old, new = olds[name], after[kind][name]
            if isinstance(old, Tensor):
                same = torch.equal(old, new)
            elif kind == "parameters":
                same = old[:-1] == new[:-1] and torch.equal(old[-1], new[-1])
            else:
                same = old == new
            if not same:
                found.append(f"{kind} of {name!r}: {old} became {new}")
    return found
