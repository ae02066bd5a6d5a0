"""Cutting a model into stages, or saying why that cannot be."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_pp.partition.balance import cut_blocks, parameter_costs
from omni_pp.partition.block_lists import find_block_lists
from omni_pp.partition.block_table import BlockTable
from omni_pp.partition.block_weights import refuse_ties
from omni_pp.partition.partitioned_model import PartitionedModel

Balance = Literal["count", "cost"] | Sequence[float]
"""By what blocks are shared out: their number, the sizes of their matrices, or given costs."""

_cut: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def partition_model(
    model: nn.Module,
    stages: int,
    *,
    stage: int,
    virtual: int = 1,
    points: Sequence[int] | None = None,
    balance: Balance = "cost",
    block_lists: Sequence[str] = (),
    release: bool = True,
) -> PartitionedModel:
    """Cut a model at its lists of blocks, and keep one stage's part.

    Every stage must be given the same arguments but ``stage``. What is outside of the blocks, such
    as embedders, is held by every stage and computed again in each chunk; what comes after the
    blocks is computed in the last one.

    Args:
        model: A transformer, whole and unmodified; its weights may be on the meta device.
        stages: How many stages there are.
        stage: Which of them to keep.
        virtual: Chunks per stage: chunk c is on stage ``c % stages``.
        points: Where to cut, as indices in the row of all blocks: a chunk begins at each. One less
            than there are chunks; default: by ``balance``.
        balance: ``"count"``; ``"cost"``, the sizes of the matrices of each block (the quadratic
            term of attention is ignored); or a cost for each block, such as those of
            `measure_block_costs`, the same on all stages.
        block_lists: As for `find_block_lists`.
        release: Move the blocks of other stages to the meta device.

    Raises:
        ParallelConfigError: It cannot be cut, or not so. Nothing was changed.
    """
    _check_stages(stages, stage, virtual)
    if model in _cut:
        msg = f"this {type(model).__name__} is cut into stages already; restore it first"
        raise ParallelConfigError(msg)
    lists = find_block_lists(model, block_lists)
    table = BlockTable(model, lists)
    _check_count(model, len(table), stages, virtual)
    parts = stages * virtual
    if points is None:
        boundaries = cut_blocks(_costs(table, balance), parts)
    else:
        boundaries = _given_cut(points, parts, len(table))
    sizes = [after - before for before, after in pairwise(boundaries)]
    owners = [chunk % stages for chunk, size in enumerate(sizes) for _ in range(size)]
    refuse_ties(table, owners, boundaries[1:-1])
    cut = PartitionedModel(
        model,
        table,
        lists,
        boundaries,
        stages=stages,
        stage=stage,
        release=release,
        on_restore=lambda: _cut.discard(model),
    )
    _cut.add(model)
    return cut


def _check_stages(stages: int, stage: int, virtual: int) -> None:
    for name, number in (("stages", stages), ("virtual", virtual)):
        if number < 1:
            msg = f"{name}={number}; legal: 1 and more"
            raise ParallelConfigError(msg)
    if not 0 <= stage < stages:
        msg = f"stage={stage} of {stages} stages; legal: 0 to {stages - 1}"
        raise ParallelConfigError(msg)


def _check_count(model: nn.Module, count: int, stages: int, virtual: int) -> None:
    if stages * virtual <= count:
        return
    most = max(1, count // stages)
    legal = [f"{count // virtual} stages"] if count >= virtual else []
    if virtual > 1 and count >= stages:
        legal.append(f"virtual={most}")
    chunks = f"{stages} stages of {virtual} chunks" if virtual > 1 else f"{stages} stages"
    msg = (
        f"{type(model).__name__} has {count} blocks, which cannot be cut into {chunks} with a "
        f"block in each; largest legal: {' or '.join(legal) or f'{count} chunks in all'}"
    )
    raise ParallelConfigError(msg)


def _costs(table: BlockTable, balance: Balance) -> list[float]:
    count = len(table)
    if isinstance(balance, str):
        if balance == "count":
            return [1.0] * count
        if balance == "cost":
            return parameter_costs([table.block(index) for index in range(count)])
        msg = f"balance={balance!r}; legal: 'count', 'cost', or a cost for each block"
        raise ParallelConfigError(msg)
    if len(balance) != count:
        msg = f"balance gives {len(balance)} costs for {count} blocks; legal: one for each"
        raise ParallelConfigError(msg)
    return [float(cost) for cost in balance]


def _given_cut(points: Sequence[int], parts: int, count: int) -> tuple[int, ...]:
    boundaries = (0, *points, count)
    rising = all(a < b for a, b in pairwise(boundaries))
    if rising and len(points) == parts - 1:
        return boundaries
    even = cut_blocks([1.0] * count, parts)[1:-1]
    msg = (
        f"points={tuple(points)} do not cut {count} blocks into {parts} chunks; legal: "
        f"{parts - 1} rising numbers from 1 to {count - 1}, such as {even}"
    )
    raise ParallelConfigError(msg)
