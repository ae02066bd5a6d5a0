"""Small models whose attention is torch's own, called in different ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    apply_sequence_parallel,
)

WIDTH = 8


def attend(tokens: Tensor, keys: Tensor | None = None, **options: Any) -> Tensor:
    """Two heads over all tokens, or over other keys; a helper beside the classes."""
    keys = tokens if keys is None else keys
    query, key = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (tokens, keys))
    out = scaled_dot_product_attention(3 * query, key, key * 0.7 + 0.3, **options)
    return out.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention of which a plan may say what it attends over."""

    def forward(self, tokens: Tensor, keys: Tensor | None = None, **options: Any) -> Tensor:
        return attend(tokens, keys, **options)


class Processor:
    """As in diffusers: an object beside the module makes the call."""

    def __init__(self) -> None:
        self.scale = 0.5

    def __call__(self, module: nn.Module, tokens: Tensor) -> Tensor:
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(
            heads, heads, heads, scale=self.scale
        )
        return out.transpose(1, 2).flatten(2)


class Processed(nn.Module):
    """Attention by a processor."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, tokens: Tensor) -> Tensor:
        return self.processor(self, tokens)


class Between(NamedTuple):
    """An output that is a named tuple."""

    tokens: Tensor
    extra: Tensor | None


@dataclass
class Output:
    """An output that is a dataclass."""

    sample: Tensor
    extra: Tensor | None = None


class Block(nn.Module):
    """Attention and something that is done for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
        if positions is not None:
            tokens = tokens + positions
        return torch.tanh(tokens + self.attn(tokens, **options))


class Toy(nn.Module):
    """A refiner, blocks, and a refiner; what happens in between is up to the test."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda tokens: tokens) -> None:
        super().__init__()
        self.refiner = Attention()
        self.start = nn.Identity()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.end = Wrapped(wrap)
        self.last = Attention()

    def forward(self, tokens: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
        tokens = self.start(self.refiner(tokens))
        for block in self.blocks:
            tokens = block(tokens, positions, **options)
        return self.last(first_tensor(self.end(tokens)))


class Wrapped(nn.Module):
    """Gives its input back in a wrapping."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, tokens: Tensor) -> Any:
        return self.wrap(tokens)


def first_tensor(output: Any) -> Tensor:
    """The tokens in a wrapping."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Output):
        return output.sample
    return next(item for item in output if isinstance(item, Tensor))


TOKENS = SequenceParallelInput(1, expected_dims=3, attends=True)
PLAN: dict[str, Any] = {
    "blocks.0": {"tokens": TOKENS},
    "blocks.*": {"positions": SequenceParallelInput(1, like="tokens")},
    "end": SequenceParallelOutput(1, expected_dims=3),
}


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Random values that depend on shape and seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Crossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Cross()

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        return self.inner(tokens, text)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        return self.attn2(self.attn1(tokens), text)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def apply(
    model: nn.Module, plan: Any = None, ulysses: int = 2, ring: int = 1, **options: Any
) -> Any:
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, **options)
    return apply_sequence_parallel(model, config, PLAN if plan is None else plan, state=state)
