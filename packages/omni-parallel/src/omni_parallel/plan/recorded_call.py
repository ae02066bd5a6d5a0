"""What one call of a module does, counted on the meta device: no weight and no number is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from omni_parallel.plan.convolutions import Convolved, convolutions_of
from omni_parallel.plan.live_bytes import LiveBytes, tensors_in


@dataclass(frozen=True)
class Attended:
    """One call of softmax attention."""

    flops: int
    queries: int
    """Tokens that attend."""
    keys: int
    """Tokens that are attended to."""
    heads: int
    query_bytes: int
    key_bytes: int
    """Of the keys alone; the values are as many."""


@dataclass
class Block:
    """What one block of a model does in a call."""

    name: str
    weights: int
    """Bytes of its parameters."""
    matmul_flops: int = 0
    """Of products of matrices and of convolutions."""
    attended: list[Attended] = field(default_factory=list)
    output_bytes: int = 0
    """What it hands on to the next."""


@dataclass(frozen=True)
class Recorded:
    """What a call does, in all."""

    blocks: list[Block]
    outside: Block
    """What is in no block."""
    convolved: list[Convolved]
    peak_bytes: int
    """Most bytes of intermediate tensors that are alive at once."""
    output_bytes: int
    """Bytes of the first tensor that it returns."""

    @property
    def flops(self) -> int:
        """Multiplications and additions of the whole call."""
        return sum(
            part.matmul_flops + sum(one.flops for one in part.attended)
            for part in (*self.blocks, self.outside)
        )


def record(
    module: nn.Module, call: Callable[[], Any], blocks: Mapping[str, nn.Module] | None = None
) -> Recorded:
    """Make a call on the meta device and count.

    Softmax attention counts as a fused kernel: the scores of all pairs of tokens are never memory.

    Args:
        module: On the meta device.
        call: Calls it, or a method of it.
        blocks: Modules within it, by name, that are counted apart.
    """
    blocks = blocks or {}
    parts = [Block(name, weight_bytes(block)) for name, block in blocks.items()]
    outside = Block("", weight_bytes(module) - sum(part.weights for part in parts))
    live, flops = LiveBytes(), FlopCounterMode(display=False)
    attention = _Attention(outside)
    with (
        torch.no_grad(),
        torch.device("meta"),
        _hooks(dict(zip(blocks.values(), parts, strict=True)), attention, flops, outside),
        convolutions_of(module) as convolved,
        flops,
        live,
        attention,
    ):
        output = call()
    outside.matmul_flops = flops.get_total_flops() - sum(part.matmul_flops for part in parts)
    first = tensors_in(output)[:1]
    return Recorded(parts, outside, convolved, live.peak, sum(t.nbytes for t in first))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module, each once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class _Attention(TorchFunctionMode):
    """Takes the place of `scaled_dot_product_attention`, and says what it was asked for."""

    def __init__(self, part: Block) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **dict(kwargs or {}))
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **dict(kwargs or {})}
        query, key, value = given["query"], given["key"], given["value"]
        *batch, heads, queries, width = query.shape
        keys = key.shape[-2]
        pairs = prod(batch) * heads * queries * keys
        self.part.attended.append(
            Attended(
                2 * pairs * (width + value.shape[-1]),
                queries,
                keys,
                heads,
                query.nbytes,
                key.nbytes,
            )
        )
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


@contextmanager
def _hooks(
    parts: Mapping[nn.Module, Block], attention: _Attention, flops: FlopCounterMode, outside: Block
) -> Iterator[None]:
    """Count what is within blocks for them; blocks are not within each other."""
    started: list[int] = []

    def enter(module: nn.Module, _: Any) -> None:
        attention.part = parts[module]
        started.append(flops.get_total_flops())

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        part, attention.part = parts[module], outside
        part.matmul_flops += flops.get_total_flops() - started.pop()
        part.output_bytes = sum(tensor.nbytes for tensor in tensors_in(output))

    handles = [block.register_forward_pre_hook(enter) for block in parts]
    handles += [block.register_forward_hook(leave) for block in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
