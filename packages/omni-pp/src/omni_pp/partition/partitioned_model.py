"""A model of which this stage holds a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from omni_pp.partition.block_lists import BlockList
from omni_pp.partition.block_table import BlockTable
from omni_pp.partition.block_weights import Refill, byte_size, let_go, tensors_of
from omni_pp.partition.chunk import Chunk


class PartitionedModel:
    """One stage's part of a model; made by `partition_model`.

    Between calls the lists of the model show the blocks of all chunks of this stage, under the
    keys that they had, so that a state dict has these alone. Load adapters and change dtypes
    before the cut or after `restore`: blocks of other stages are out of reach in between.

    Attributes:
        model: The model that was cut.
        stages: How many stages there are.
        stage: Which of them this is.
        virtual: How many chunks each stage has.
        boundaries: Of the chunks in the row of all blocks, from 0 to their number.
        block_lists: The lists that make up this row, as they were.
        chunks: Those of this stage, in order of execution.
        table: Where its blocks are.
    """

    def __init__(
        self,
        model: nn.Module,
        table: BlockTable,
        block_lists: tuple[BlockList, ...],
        boundaries: tuple[int, ...],
        *,
        stages: int,
        stage: int,
        release: bool,
        on_restore: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.block_lists, self.boundaries = model, block_lists, boundaries
        self.stages, self.stage = stages, stage
        self.virtual = (len(boundaries) - 1) // stages
        self.table = table
        self._on_restore = on_restore
        self.chunks = tuple(
            Chunk(model, table, index, range(boundaries[index], boundaries[index + 1]))
            for index in range(stage, len(boundaries) - 1, stages)
        )
        own = self._indices(stage)
        table.show(own)
        if release:
            others = [table.block(index) for index in range(len(table)) if index not in own]
            let_go(others, [tensor for _, _, tensor in tensors_of(model)])

    @property
    def parameter_bytes(self) -> int:
        """Bytes of parameters that this stage holds now; those on the meta device are not held."""
        held = [*self._shared_parameters()]
        for index in range(len(self.table)):
            held += self.table.block(index).parameters()
        return byte_size(one for one in held if not one.is_meta)

    def promised_bytes(self, stage: int) -> int:
        """Bytes of parameters that a stage holds: of its blocks, and of all outside of blocks."""
        blocks = [one for _, block in self.blocks_of(stage) for one in block.parameters()]
        return byte_size([*self._shared_parameters(), *blocks])

    def blocks_of(self, stage: int) -> list[tuple[str, nn.Module]]:
        """The blocks of a stage with their dotted names, also those that were let go here."""
        indices = sorted(self._indices(stage))
        return [(self.table.name(index), self.table.block(index)) for index in indices]

    def released(self) -> list[tuple[str, nn.Module]]:
        """The blocks of other stages whose weights are not in memory here, with dotted names."""
        others = [one for stage in range(self.stages) for one in self.blocks_of(stage)]
        own = {name for name, _ in self.blocks_of(self.stage)}
        return [
            (name, block)
            for name, block in others
            if name not in own and any(tensor.is_meta for _, _, tensor in tensors_of(block))
        ]

    def materialize(self, device: torch.device | str) -> Iterator[tuple[int, Tensor]]:
        """Make room for the blocks of other stages, and say who has their weights.

        Yields of every block, in an order equal on all stages, each parameter and buffer once,
        with the stage that owns it. Weights that were let go are empty, of any content, and are to
        be filled from the owner, as by a broadcast, before the next is asked for or later.

        Args:
            device: Where to make them; what is held stays where it is.

        Yields:
            The owner's stage and the tensor; parameters as such, so write within ``no_grad``.
        """
        refill = Refill(torch.device(device))
        own = self._indices(self.stage)
        seen: dict[int, Tensor] = {}  # alive: the id of a dead one may be given to another
        for index in range(len(self.table)):
            block = self.table.block(index)
            if index not in own:
                refill.fill(block)
            for _, _, tensor in tensors_of(block):
                if id(tensor) not in seen:
                    seen[id(tensor)] = tensor
                    yield self._stage_of(index), tensor

    def restore(self) -> None:
        """Put all blocks back in their places; weights let go are on meta, see `materialize`."""
        self.table.show(range(len(self.table)))
        self._on_restore()

    def _stage_of(self, index: int) -> int:
        chunk = next(c for c, end in enumerate(self.boundaries[1:]) if index < end)
        return chunk % self.stages

    def _indices(self, stage: int) -> frozenset[int]:
        return frozenset(i for i in range(len(self.table)) if self._stage_of(i) == stage)

    def _shared_parameters(self) -> list[nn.Parameter]:
        """Those outside of all blocks, which every stage holds."""
        with self.table.installed({}):
            return list(self.model.parameters())
