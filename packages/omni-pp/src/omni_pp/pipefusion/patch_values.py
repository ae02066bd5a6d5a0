"""Values that arrive patch by patch, and what is to be computed of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from omni_pp.pipefusion.token_layout import TokenLayout


class Ledger:
    """The values that are still to be computed, so that none waits for longer than a call.

    Attributes:
        arrive: Has everything arrive that is under way.
    """

    def __init__(self) -> None:
        self.arrive: Callable[[], None] = lambda: None
        self._pending: list[ref[Values]] = []

    def enter(self, values: Values) -> None:
        """Take note of values that were recorded."""
        self._pending.append(ref(values))

    def settle(self) -> None:
        """Compute all that was recorded and is still wanted: it then holds on to nothing else."""
        pending, self._pending = self._pending, []
        for weak in pending:
            values = weak()
            if values is not None:
                values.flat()


class Values(ABC):
    """The values of a tensor in its flat form, each computed once, when it is asked for.

    Args:
        ledger: Where they are entered.
        layout: How tokens lie in the tensor.
    """

    def __init__(self, ledger: Ledger, layout: TokenLayout) -> None:
        self.ledger, self.layout = ledger, layout
        self._patches: list[Tensor | None] = [None] * layout.patches
        self._flat: Tensor | None = None
        ledger.enter(self)

    def patch(self, index: int) -> Tensor:
        """Those of one patch."""
        if self._flat is not None:
            return self.layout.patch(self._flat, index)
        found = self._patches[index]
        if found is None:
            found = self._patches[index] = self._compute(index)
            if all(one is not None for one in self._patches):
                self._forget()
        return found

    def flat(self) -> Tensor:
        """All of them."""
        if self._flat is None:
            if any(one is not None for one in self._patches) or not self._computes_flat:
                patches = [self.patch(index) for index in range(self.layout.patches)]
                self._flat = torch.cat(patches, dim=self.layout.axis)
            else:
                self._flat = self._compute(None)
            self._forget()
            self._patches = []
        return self._flat

    _computes_flat = True

    @abstractmethod
    def _compute(self, index: int | None) -> Tensor:
        """Those of a patch, or all of them."""

    @abstractmethod
    def _forget(self) -> None:
        """All were computed: let go of what they were computed of."""


class Arriving(Values):
    """The result of a call, from the last stage.

    Args:
        ledger: Where they are entered.
        layout: How tokens lie in the result.
        take: For each patch, waits for it.
    """

    _computes_flat = False

    def __init__(
        self, ledger: Ledger, layout: TokenLayout, take: Sequence[Callable[[], Tensor]]
    ) -> None:
        super().__init__(ledger, layout)
        self._take = tuple(take)

    def _compute(self, index: int | None) -> Tensor:
        return self._take[0 if index is None else index]()

    def _forget(self) -> None:
        self._take = ()


class Whole:
    """An operand that is there: its flat form, or what is the same for all tokens."""

    def __init__(self, flat: Tensor, layout: TokenLayout | None) -> None:
        self.of_all, self._layout = flat, layout

    def of(self, index: int | None) -> Tensor:
        """What goes with a patch, or with all of them."""
        if index is None or self._layout is None:
            return self.of_all
        return self._layout.patch(self.of_all, index)


class Recorded(Values):
    """The result of an operation that gives the same in the flat form.

    Args:
        ledger: Where they are entered.
        layout: How tokens lie in the result.
        function: The operation; its arguments may be others in the flat form.
        args: Of it, with `Values` and `Whole` in place of tensors.
        kwargs: As ``args``.
    """

    def __init__(
        self,
        ledger: Ledger,
        layout: TokenLayout,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__(ledger, layout)
        self._function = function
        self._args, self._kwargs = tuple(args), kwargs

    def _compute(self, index: int | None) -> Tensor:
        args = [_of(value, index) for value in self._args]
        kwargs = {name: _of(value, index) for name, value in self._kwargs.items()}
        found: Tensor = self._function(*args, **kwargs)
        return found

    def _forget(self) -> None:
        self._args, self._kwargs = (), {}


def _of(value: Any, index: int | None) -> Any:
    if isinstance(value, Values):
        return value.flat() if index is None else value.patch(index)
    if isinstance(value, Whole):
        return value.of(index)
    if isinstance(value, list | tuple):
        return [_of(item, index) for item in value]
    return value
