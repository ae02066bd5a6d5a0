"""Cutting a model into stages, or saying why that cannot be."""

from __future__ import annotations

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

_CUT = "_omni_partition"


def partition_model(
    model: nn.Module,
    stages: int,
    *,
    stage: int,
    virtual_stages: int = 1,
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
        virtual_stages: Chunks per stage: chunk c is on stage ``c % stages``.
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
    _check_stages(stages, stage, virtual_stages)
    if partition_of(model) is not None:
        msg = f"this {type(model).__name__} is cut into stages already; restore it first"
        raise ParallelConfigError(msg)
    _refuse_sharded(model)
    lists = find_block_lists(model, block_lists)
    table = BlockTable(model, lists)
    _check_count(model, len(table), stages, virtual_stages)
    boundaries = _boundaries(table, stages * virtual_stages, points, balance)
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
        on_restore=lambda: model.__dict__.pop(_CUT, None),
    )
    # Not in a table of ours: it holds the model, which would never be freed.
    model.__dict__[_CUT] = cut
    return cut


def partition_of(model: nn.Module) -> PartitionedModel | None:
    """How a model is cut now; ``None`` if it is whole."""
    found: PartitionedModel | None = model.__dict__.get(_CUT)
    return found


def refuse_other_cut(
    part: PartitionedModel,
    *,
    virtual_stages: int = 1,
    points: Sequence[int] | None = None,
    balance: Balance = "cost",
    block_lists: Sequence[str] = (),
) -> None:
    """Refuse to have a model cut in another way than it is.

    Args:
        part: How it is cut.
        virtual_stages: As of `partition_model`; where all are the default, any cut is right.
        points: Likewise.
        balance: Likewise.
        block_lists: Likewise.

    Raises:
        ParallelConfigError: It would be cut elsewhere.
    """
    if (virtual_stages, points, balance, tuple(block_lists)) == (1, None, "cost", ()):
        return
    name = type(part.model).__name__
    there = (
        f"this {name} is cut at {part.boundaries[1:-1]} into {part.stages} stages of "
        f"{part.virtual} chunks each already"
    )
    legal = "legal: the options that it was cut by, or none of them"
    names = tuple(one.name for one in part.block_lists)
    if block_lists and tuple(block_lists) != names:
        msg = f"block_lists={tuple(block_lists)}: {there}, of the lists {names}; {legal}"
        raise ParallelConfigError(msg)
    _check_count(part.model, part.boundaries[-1], part.stages, virtual_stages)
    asked = _boundaries(part.table, part.stages * virtual_stages, points, balance)
    if asked != part.boundaries:
        msg = f"{there}, and is asked to be cut at {asked[1:-1]}; {legal}"
        raise ParallelConfigError(msg)


def _check_stages(stages: int, stage: int, virtual_stages: int) -> None:
    given: tuple[tuple[str, object], ...] = (("stages", stages), ("virtual_stages", virtual_stages))
    for name, number in given:
        if not isinstance(number, int) or number < 1:
            msg = f"{name}={number!r}; legal: 1 and more, whole numbers"
            raise ParallelConfigError(msg)
    if stage not in range(stages):
        msg = f"stage={stage!r} of {stages} stages; legal: 0 to {stages - 1}"
        raise ParallelConfigError(msg)


def _refuse_sharded(model: nn.Module) -> None:
    if (name := distributed_weight(model)) is not None:
        msg = (
            f"{type(model).__name__} cannot be cut into stages while ranks share its weights "
            f"({name} is distributed): a stage would let go of shares that others gather. Legal: "
            "remove_hsdp(), cut it first, and then shard what each stage holds over ranks of that "
            "stage, such as the layout pp=2, ulysses=2, fs=2"
        )
        raise ParallelConfigError(msg)


def distributed_weight(model: nn.Module) -> str | None:
    """Name of a parameter of which this rank has a share; ``None`` if it has all of each."""
    from torch.distributed.tensor import DTensor

    found = (name for name, one in model.named_parameters() if isinstance(one, DTensor))
    return next(found, None)


def _check_count(model: nn.Module, count: int, stages: int, virtual_stages: int) -> None:
    if stages * virtual_stages <= count:
        return
    fewer = count // virtual_stages
    legal = [f"{fewer} {'stage' if fewer == 1 else 'stages'}"] if fewer else []
    if virtual_stages > 1 and count >= stages:
        legal.append(f"virtual_stages={count // stages}")
    chunks = f"{stages} stages"
    if virtual_stages > 1:
        chunks += f" of virtual_stages={virtual_stages} chunks each"
    msg = (
        f"{type(model).__name__} has {count} blocks, which cannot be cut into {chunks} with a "
        f"block in each; largest legal: {' or '.join(legal) or f'{count} chunks in all'}"
    )
    raise ParallelConfigError(msg)


def _boundaries(
    table: BlockTable, parts: int, points: Sequence[int] | None, balance: Balance
) -> tuple[int, ...]:
    if points is None:
        return cut_blocks(_costs(table, balance), parts)
    return _given_cut(points, parts, len(table))


def _costs(table: BlockTable, balance: Balance) -> list[float]:
    count = len(table)
    if isinstance(balance, str):
        if balance == "count":
            return [1.0] * count
        if balance == "cost":
            return parameter_costs([table.block(index) for index in range(count)])
        msg = f"balance={balance!r}; legal: 'count', 'cost', or a cost for each block"
        raise ParallelConfigError(msg)
    if not isinstance(balance, Sequence):
        msg = f"balance={balance!r}; legal: 'count', 'cost', or a cost for each block"
        raise ParallelConfigError(msg)
    if len(balance) != count:
        msg = f"balance gives {len(balance)} costs for {count} blocks; legal: one for each"
        raise ParallelConfigError(msg)
    if not all(isinstance(cost, int | float) for cost in balance) or not any(balance):
        msg = f"balance={tuple(balance)!r}; legal: a number for each block, not all of them zero"
        raise ParallelConfigError(msg)
    return [float(cost) for cost in balance]


def _given_cut(points: Sequence[int], parts: int, count: int) -> tuple[int, ...]:
    boundaries = (0, *points, count)
    whole = all(isinstance(point, int) for point in points)
    rising = whole and all(a < b for a, b in pairwise(boundaries))
    if rising and len(points) == parts - 1:
        return boundaries
    even = cut_blocks([1.0] * count, parts)[1:-1]
    msg = (
        f"points={tuple(points)} do not cut {count} blocks into {parts} chunks; legal: "
        f"{parts - 1} rising numbers from 1 to {count - 1}, such as {even}"
    )
    raise ParallelConfigError(msg)
