"""Attention of split queries to keys that every rank holds whole."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from omni_group_coordinator import ParallelError
from omni_sp.application import Application
from omni_sp.plan_entries import SequenceParallelAttention

_KEYS = "encoder_hidden_states"
_EVERY_STREAM = SequenceParallelAttention()


class LocalAttention:
    """Watches that a module really attends to something else than its own, split tokens.

    diffusers' attention modules attend to themselves where ``encoder_hidden_states`` is missing.

    Args:
        name: Name of the module in the model.
        module: The module.
        application: Knows the region of the call that is under way.
    """

    def __init__(self, name: str, module: nn.Module, application: Application) -> None:
        self._where = f"attention of module {name!r}"
        self._application = application
        names = list(inspect.signature(module.forward).parameters)
        self._position = names.index(_KEYS) if _KEYS in names else None

    def hook(self, module: nn.Module) -> list[RemovableHandle]:
        """Have calls of the module watched."""
        return [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def _end(self, *_: object) -> None:
        self._application.legal_calls -= 1

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._application.legal_calls += 1
        self._check(module, args, kwargs)

    def _check(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        region, position = self._application.region, self._position
        if region is None or position is None:
            return
        keys = args[position] if position < len(args) else kwargs.get(_KEYS)
        if keys is None and region.is_open(_EVERY_STREAM, self._where):
            msg = (
                f"{self._where} is local by the plan, and was called without {_KEYS}: it would "
                "attend to this rank's tokens alone; pass a text, or name in a plan of your own "
                "what it attends over"
            )
            raise ParallelError(msg)
