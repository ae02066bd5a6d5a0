"""Counts of what reaches torch's dispatcher: kernels, and communication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_COMMUNICATION: Final = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_NO_KERNEL: Final = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view")
_NO_CALL: Final = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class DispatchCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators within a ``with`` block.

    Attributes:
        kernels: Operators that compute or copy: no views, no allocation, no communication.
        communication: Operators that communicate.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.communication: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each operator."""
        if isinstance(func, OpOverload):
            self._count(func)
        return func(*args, **dict(kwargs or {}))

    def _count(self, func: OpOverload) -> None:
        name = str(func.overloadpacket.__name__)
        if func.namespace in _COMMUNICATION:
            if name not in _NO_CALL:
                self.communication[name.rstrip("_")] += 1
        elif not func.is_view and name not in _NO_KERNEL:
            self.kernels[f"{func.namespace}.{name}"] += 1
