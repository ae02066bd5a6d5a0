"""The weights of blocks: who shares them, how large they are, and letting go of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition.block_table import BlockTable


def tensors_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Each parameter and buffer, with the dict that it is in; what is shared comes repeatedly."""
    for inner in module.modules():
        for held in (inner._parameters, inner._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    yield held, name, tensor


def byte_size(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters, each counted once."""
    unique = {id(one): one for one in parameters}
    return sum(one.numel() * one.element_size() for one in unique.values())


def let_go(blocks: Iterable[nn.Module], keep: Iterable[Tensor]) -> None:
    """Move the weights of blocks to the meta device, which frees their memory.

    Weights that are shared stay shared, and those of ``keep`` stay where they are.
    """
    kept = {id(one) for one in keep}
    moved: dict[int, Tensor] = {}
    old: list[Tensor] = []  # alive until the end: the id of a dead one may be given to another
    for block in blocks:
        for held, name, tensor in tensors_of(block):
            if id(tensor) in kept or tensor.is_meta:
                continue
            if id(tensor) not in moved:
                old.append(tensor)
                moved[id(tensor)] = _like(tensor, torch.device("meta"))
            held[name] = moved[id(tensor)]


class Refill:
    """Gives memory, of any content, to what is on the meta device; what is shared stays shared.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones: an id is not reused

    def fill(self, block: nn.Module) -> None:
        """Replace the parameters and buffers of a block that are on the meta device."""
        for held, name, tensor in tensors_of(block):
            if not tensor.is_meta:
                continue
            if id(tensor) not in self._made:
                self._made[id(tensor)] = (tensor, _like(tensor, self._device))
            held[name] = self._made[id(tensor)][1]


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    with torch.no_grad():
        empty = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        parameter.__dict__.update(tensor.__dict__)
        return parameter
    return empty


def refuse_ties(table: BlockTable, stages: Sequence[int], cuts: tuple[int, ...]) -> None:
    """Refuse a cut between blocks that share a parameter.

    Args:
        table: The blocks.
        stages: The stage of each block.
        cuts: The inner boundaries.

    Raises:
        ParallelConfigError: Blocks of two stages share one; says which, and where a cut can be.
    """
    first: dict[int, tuple[int, str]] = {}
    ties: list[tuple[int, int, str]] = []
    for index in range(len(table)):
        for name, parameter in table.block(index).named_parameters():
            before, _ = first.setdefault(id(parameter), (index, name))
            if before != index:
                ties.append((before, index, first[id(parameter)][1]))
    for before, after, name in ties:
        if stages[before] == stages[after]:
            continue
        legal = [
            point
            for point in range(1, len(table))
            if not any(one < point <= other for one, other, _ in ties)
        ]
        crossing = next(point for point in cuts if before < point <= after)
        nearest = sorted(sorted(legal, key=lambda point: abs(point - crossing))[:2])
        msg = (
            f"cut at {crossing} of {len(table)} blocks: {table.name(before)} and "
            f"{table.name(after)} would be on stages {stages[before]} and {stages[after]}, and "
            f"share the parameter {name!r}; nearest cuts through no shared parameter: "
            f"{', '.join(map(str, nearest)) or 'none'}"
        )
        raise ParallelConfigError(msg)
