"""A list of blocks of which some are on other stages, as code outside of the model sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError


class PartOfList(nn.ModuleList):
    """Refuses to be gone over by position, while no chunk runs.

    What goes by the position of a block, such as guidance that leaves layers out, would take
    another block, or none, and each stage would another one.
    """

    _omni_is_running: Callable[[], bool]

    def _check(self) -> None:
        if not self._omni_is_running():
            keys = ", ".join(self._modules)
            msg = (
                f"a list of blocks was gone over by position, of which this stage holds {keys}: "
                "guidance that leaves layers out, and what else goes by a block's position in the "
                "whole model, cannot be done on stages; for this stage's blocks take children()"
            )
            raise ParallelConfigError(msg)

    def __iter__(self) -> Iterator[nn.Module]:
        """Its blocks, while a chunk runs.

        Raises:
            ParallelConfigError: None does.
        """
        self._check()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        """A block by its position, or several of them, while a chunk runs.

        Raises:
            ParallelConfigError: None does.
        """
        self._check()
        return super().__getitem__(index)

    def __repr__(self) -> str:
        """As of any module with children."""
        return nn.Module.__repr__(self)


def make_part(held: nn.Module, is_running: Callable[[], bool]) -> Callable[[], None]:
    """Have a list refuse to be gone over by position.

    Args:
        held: The list; its class becomes another one.
        is_running: Whether a chunk runs.

    Returns:
        Gives the list its class back.
    """
    cls = type(held)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    held.__class__ = type(cls.__name__, (PartOfList, cls), names)
    held.__dict__["_omni_is_running"] = is_running

    def undo() -> None:
        held.__dict__.pop("_omni_is_running", None)
        held.__class__ = cls

    return undo
