"""Where the blocks of a model are, and which of them stand in its lists."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from omni_group_coordinator import ParallelError
from omni_pp.partition.block_lists import BlockList
from omni_pp.partition.part_of_list import make_part


class BlockTable:
    """The blocks of all lists in one row, by their index in it.

    The lists themselves stay the objects that they were, with the keys that they had; only what
    they hold is exchanged. A block that stands in a list is looked up there, so that one that was
    wrapped or replaced since counts as the block.

    Args:
        model: The model.
        lists: Those of its trunk, in order of execution.
    """

    def __init__(self, model: nn.Module, lists: tuple[BlockList, ...]) -> None:
        self._lists = {one.name: model.get_submodule(one.name) for one in lists}
        self._places = [(name, key) for name, held in self._lists.items() for key in held._modules]
        self._away: dict[int, nn.Module] = {}
        self._running = False
        self._parts: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Dotted path of a block in the whole model."""
        return ".".join(self._places[index])

    def block(self, index: int) -> nn.Module:
        """A block, in place or not."""
        away = self._away.get(index)
        if away is not None:
            return away
        name, key = self._places[index]
        return self._lists[name].get_submodule(key)

    def show(self, indices: Collection[int]) -> None:
        """Leave these blocks alone in the lists."""
        blocks = {index: self.block(index) for index in range(len(self))}
        self._away = {index: one for index, one in blocks.items() if index not in indices}
        self._fill({index: blocks[index] for index in sorted(indices)})
        while self._parts:
            self._parts.pop()()
        if self._away:
            self._parts += [make_part(held, lambda: self._running) for held in self._lists.values()]

    @contextmanager
    def installed(self, contents: Mapping[int, nn.Module]) -> Iterator[None]:
        """These modules alone stand in the lists, in the places of the blocks of these indices."""
        if self._running:
            msg = "a chunk of this model is running; its lists can hold only one at a time"
            raise ParallelError(msg)
        before = {name: dict(held._modules) for name, held in self._lists.items()}
        self._running = True
        try:
            self._fill(contents)
            yield
        finally:
            for name, held in self._lists.items():
                held._modules.clear()
                held._modules.update(before[name])
            self._running = False

    def _fill(self, contents: Mapping[int, nn.Module]) -> None:
        for held in self._lists.values():
            held._modules.clear()
        for index, module in sorted(contents.items()):
            name, key = self._places[index]
            self._lists[name]._modules[key] = module
