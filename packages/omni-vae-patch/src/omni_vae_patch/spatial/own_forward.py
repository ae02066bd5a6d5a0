"""Forwards that a rule would leave out: of a subclass, or put on one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_vae_patch.spatial.windows import REMEDY

# Of diffusers: these pad, join frames or cast, and then call the forward of torch's class, whose
# rule counts. Looked through in 0.39 to 0.42.
_CALL_THEIR_PARENT = frozenset(
    {
        "CosmosCausalConv3d",
        "EasyAnimateCausalConv3d",
        "LoRACompatibleConv",
        "QwenImage21CausalConv3d",
        "QwenImage21Upsample",
        "QwenImageCausalConv3d",
        "QwenImageUpsample",
        "WanCausalConv3d",
        "WanUpsample",
    }
)
_METHODS = {"forward", "_conv_forward"}


def check_forward(name: str, module: nn.Module, known: type[nn.Module]) -> None:
    """Check that a module does what is known of a class that it is derived from.

    A rule changes what that class does. A forward of a class in between would be left out, or
    not call what was changed.

    Args:
        name: Name of the module in the autoencoder.
        module: The module.
        known: The class.

    Raises:
        ParallelConfigError: A class in between has a forward of its own.
    """
    if known.forward is nn.Module.forward:
        return  # there is none to be overridden: what is known is of the classes below
    for cls in type(module).__mro__:
        if cls is known:
            return
        if _METHODS & vars(cls).keys() and not _is_understood(cls):
            msg = (
                f"module {name!r} is a {type(module).__name__}, a {known.__name__} whose "
                f"{min(_METHODS & vars(cls).keys())} is that of {cls.__name__}, of which it is not "
                f"known how it mixes positions in space; {REMEDY}"
            )
            raise ParallelConfigError(msg)


def _is_understood(cls: type) -> bool:
    if cls.__module__.startswith("diffusers."):
        return cls.__name__ in _CALL_THEIR_PARENT
    return cls.__module__.startswith("torch.")


def check_kept(name: str, module: nn.Module, before: Any, undo: Callable[[], None]) -> None:
    """Check that a rule has not taken the place of a forward that was put on this one module.

    As hooks put it there, which cast or fetch the weights first.

    Args:
        name: Name of the module in the autoencoder.
        module: The module, rule applied.
        before: The forward that was put on it before, if any.
        undo: Undoes what the rule did.

    Raises:
        ParallelConfigError: It has; the rule is undone.
    """
    if before is None or vars(module).get("forward") is before:
        return
    undo()
    msg = (
        f"module {name!r}, a {type(module).__name__}, has a forward of its own beside that of its "
        "class, as hooks put it there for layerwise casting or offloading, and on shards it would "
        "be left out; call parallelize_vae first and then what puts it there "
        "(enable_layerwise_casting), or use mode='tile'"
    )
    raise ParallelConfigError(msg)
