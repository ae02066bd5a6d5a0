"""Finding attention that nobody took over, in the first call of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from omni_group_coordinator import ParallelError
from omni_sp.application import Application
from omni_sp.plan_entries import SequenceParallelAttention

_EVERY_STREAM = SequenceParallelAttention()
_ATTENTION = (scaled_dot_product_attention, multi_head_attention_forward)


class UnknownAttention(TorchFunctionMode):
    """Raises where a model attends, while its sequence is split, in a way that was not found.

    However the call is written: a helper in another file, a function that is kept in an
    attribute, ``nn.MultiheadAttention``. It slows every operation, so it watches one call only.

    Args:
        application: Knows what is split, and which attention calls are known.
    """

    def __init__(self, application: Application) -> None:
        super().__init__()
        self._application = application

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for each function of its API."""
        if any(func is known for known in _ATTENTION):
            self._check(func)
        return func(*args, **(kwargs or {}))

    def _check(self, func: Callable[..., Any]) -> None:
        region = self._application.region
        if region is None or self._application.legal_calls:
            return
        if region.is_open(_EVERY_STREAM, "attention"):
            msg = (
                f"the model calls {getattr(func, '__name__', func)} while its sequence is split, "
                "from code in which omni-sp found no attention, so it would attend to this rank's "
                "tokens alone; call torch's scaled_dot_product_attention by that name in a method "
                "of the module or of its processor, or name the module LOCAL_ATTENTION in the "
                "plan if its keys are whole"
            )
            raise ParallelError(msg)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether modules inside are compiled on their own, which cannot be traced while watched.

    By the attributes that torch sets in ``Module.compile`` and ``torch.compile``, for which it has
    no public question; checked on torch 2.13.
    """
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
