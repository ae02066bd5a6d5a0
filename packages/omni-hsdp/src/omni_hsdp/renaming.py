"""Keys of checkpoints that a model has under other names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from omni_parallel_state.checkpoints.files import Entry

_Rename = Callable[[str], str]


def renamed(model: nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries by the keys that the model has, where its class renames those of files.

    Args:
        model: The model, not yet sharded.
        entries: What the checkpoint has.
    """
    tensors = model.state_dict(keep_vars=True)
    prefix = getattr(model, "base_model_prefix", "")
    renames = _renames_of(model)
    if not (prefix or renames):
        return entries
    found: dict[str, Entry] = {}
    stripped = False
    for key, entry in entries.items():
        new = key
        if key not in tensors:
            for rename in renames:
                new = rename(new)
            bare = new.removeprefix(f"{prefix}.")
            if bare != new and bare in tensors:
                stripped, new = True, bare
            elif f"{prefix}.{new}" in tensors:
                new = f"{prefix}.{new}"
        if new in found or (new != key and new in entries):
            new = key  # two for one: neither is known to be it
        found[new] = entry
    if stripped:  # of a model with a head, which this one lacks: all of it is beside the prefix
        found = {k: e for k, e in found.items() if k in tensors or k.startswith(f"{prefix}.")}
    return found


def _renames_of(model: nn.Module) -> list[_Rename]:
    """How the class of a model renames keys.

    Transformers 4 says so in an attribute of the class, 5 in a table beside it; what it does to
    the tensors themselves, such as merging some, is left out.
    """
    attribute = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    renames = [_by_pattern(*pair) for pair in attribute.items()]
    package = type(model).__module__.partition(".")[0]
    table = sys.modules.get(f"{package}.conversion_mapping")
    listed = getattr(table, "get_model_conversion_mapping", None)
    if listed is not None and hasattr(model, "base_model_prefix"):
        for transform in listed(model):
            if not hasattr(transform, "operations"):
                renames.append(_by_transform(transform))
    return renames


def _by_pattern(pattern: str, replacement: str) -> _Rename:
    return lambda key: re.sub(pattern, replacement, key)


def _by_transform(transform: Any) -> _Rename:
    def rename(key: str) -> str:
        return str(transform.rename_source_key(key)[0])

    return rename
