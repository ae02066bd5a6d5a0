"""What torch's ``fully_shard`` does to a module, and taking it off again.

torch itself has no way to do so. The only file that knows how torch keeps its records, which is
private; checked on torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping

_OURS = "torch.distributed.fsdp"
_STATE_HOOKS = (
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", *_STATE_HOOKS)
_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


@cache
def _named_as_original(cls: type) -> type:
    original = cls.__mro__[2]
    members = {
        "__deepcopy__": cls.__dict__["__deepcopy__"],
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, cls.__bases__, members)


def keep_class_name(module: nn.Module) -> None:
    """Give a module that was just sharded the name of its class back.

    torch calls the class of a sharded ``Flux`` ``FSDPFlux``; diffusers looks up by name what it
    knows of a class, for example when adapters are switched.
    """
    cls: type = type(module)
    module.__class__ = _named_as_original(cls)


def can_remove(module: nn.Module) -> bool:
    """Whether the class of a module is the one that sharding gave it, and no later one."""
    from torch.distributed.fsdp import FSDPModule

    return type(module).__mro__[1] is FSDPModule


def remove_fully_shard(module: nn.Module) -> None:
    """Give a module its class back, and drop hooks and records of torch.

    Its parameters are the caller's business.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(module, FSDPModule):
        module.__class__ = type(module).__mro__[2]
    for name in _HOOKS:
        _remove_hooks(module, name)
    for flag in _FLAGS:
        module.__dict__.pop(flag, None)
    _module_state_mapping.pop(module, None)
    states, registry = module.__dict__.get(STATE_KEY), module.__dict__.get(REGISTRY_KEY)
    for records in (states or {}, registry or {}):
        for key in list(records):
            if getattr(key, "__name__", key) == fully_shard.__name__:
                del records[key]
    for key in (STATE_KEY, REGISTRY_KEY):
        if not module.__dict__.get(key, True):
            del module.__dict__[key]


def forget_order(modules: Iterable[nn.Module]) -> None:
    """Drop torch's record of the order of a forward, which otherwise only a backward clears."""
    for module in modules:
        state = _state_of(module)
        state._comm_ctx.post_forward_order.clear()
        for group in state._fsdp_param_groups:
            group._post_forward_indices.clear()


def initialise_root(model: nn.Module) -> None:
    """Have torch take a model for the root, whichever of its modules is called first."""
    _state_of(model)._lazy_init()


def is_part(module: nn.Module) -> bool:
    """Whether a module is one that torch shards, or lies in one."""
    return _FLAGS[0] in module.__dict__


def _state_of(module: nn.Module) -> Any:
    return cast("Any", module)._get_fsdp_state()


@contextmanager
def without_state_hooks(model: nn.Module) -> Iterator[None]:
    """Have ``state_dict`` and ``load_state_dict`` leave weights as they are within the block.

    torch gives up what is gathered in both, and expects shares after loading; peft calls both
    when it loads an adapter.
    """
    taken: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    for module in model.modules():
        for name in _STATE_HOOKS:
            hooks = module.__dict__[name]
            ours = {key: hook for key, hook in hooks.items() if _is_of_torch(hook)}
            for key in ours:
                del hooks[key]
            taken.append((hooks, ours))
    try:
        yield
    finally:
        for hooks, ours in taken:
            hooks.update(ours)


def _remove_hooks(module: nn.Module, name: str) -> None:
    hooks = module.__dict__[name]
    for key in [key for key, hook in hooks.items() if _is_of_torch(hook)]:
        del hooks[key]
        for flags in ("_with_kwargs", "_always_called"):
            module.__dict__.get(f"{name}{flags}", {}).pop(key, None)


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook is one of FSDP's, wrapped or not."""
    inner = getattr(hook, "hook", hook)
    return str(getattr(inner, "__module__", "")).startswith(_OURS)
