"""Which tensor of a checkpoint goes where in a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_hsdp.checkpoint import Entry, converts

_Rename = Callable[[str], str]


def matched(model: nn.Module, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of a checkpoint that a model takes, by their keys in the model.

    Args:
        model: The model, not yet sharded.
        entries: What the checkpoint has.

    Raises:
        ParallelConfigError: It lacks keys, has others or other shapes; lists them.
    """
    tensors = model.state_dict(keep_vars=True)
    entries = _renamed(model, entries, tensors)
    filled = {id(tensors[key]) for key in entries.keys() & tensors.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    both = [(key, entry, tensors[key]) for key, entry in sorted(entries.items()) if key in tensors]
    problems = {
        "missing": [key for key, tensor in tensors.items() if id(tensor) not in filled],
        "unexpected": [
            key
            for key in sorted(entries.keys() - tensors.keys())
            if not any(re.search(pattern, key) for pattern in ignored)
        ],
        "shapes": [
            f"{key} is {list(entry.shape)} in the checkpoint, {list(tensor.shape)} in the model"
            for key, entry, tensor in both
            if entry.shape != tuple(tensor.shape)
        ],
        "dtypes, of which only floating-point ones are cast": [
            f"{key} is {entry.dtype} in the checkpoint, {tensor.dtype} in the model"
            for key, entry, tensor in both
            if not converts(entry.dtype, tensor.dtype)
        ],
    }
    if any(problems.values()):
        raise _does_not_fit(model, problems)
    return {key: entry for key, entry, _ in both}


def _does_not_fit(model: nn.Module, problems: dict[str, list[str]]) -> ParallelConfigError:
    lines = [
        f"{title} ({len(found)}): {', '.join(found)}" for title, found in problems.items() if found
    ]
    msg = f"the checkpoint does not fit {type(model).__name__}:\n  " + "\n  ".join(lines)
    if problems["missing"] and hasattr(model, "base_model_prefix"):
        msg += (
            "\n  keys are renamed as the model's class says, and tensors are read as they are; if "
            "from_pretrained() does more for this class, load with it and call "
            "apply_hsdp_to_model()"
        )
    return ParallelConfigError(msg)


def _renamed(
    model: nn.Module, entries: dict[str, Entry], tensors: dict[str, Any]
) -> dict[str, Entry]:
    """The entries by the keys that the model has, where its class renames those of files."""
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
