"""Bytes of the tensors that are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that operators make within a ``with`` block, while they are alive.

    By storage, from the operator that made it until Python and torch let go of it. It is the same
    in every run and on every machine, which the memory of a process is not. Weights and other
    tensors from before do not count, nor does what an operator allocates for itself and frees.

    Attributes:
        peak: Most bytes at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each operator."""
        given = {id_of(tensor) for tensor in self.tensors_in((args, kwargs))}
        output = func(*args, **dict(kwargs or {}))
        for tensor in self.tensors_in(output):
            if id_of(tensor) not in given | self._live:
                self._follow(tensor)
        return output

    def tensors_in(self, tree: Any) -> list[Tensor]:
        """The tensors of an operator's arguments or output that count."""
        return tensors_in(tree)

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), id_of(tensor)
        self._live.add(key)
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._bytes -= size


def id_of(tensor: Tensor) -> int:
    """The storage of a tensor, as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
