"""Whether a checkpoint is that of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state.checkpoints.dtypes import converts
from omni_parallel_state.checkpoints.files import Entry


def matched(model: nn.Module, entries: Mapping[str, Entry], advice: str) -> dict[str, Entry]:
    """The tensors of a checkpoint that a model takes, by their keys in the model.

    Args:
        model: The whole model, with or without values.
        entries: What the checkpoint has, by the keys that the model should have.
        advice: What to say of a class of transformers whose keys are missing, for
            ``from_pretrained()`` may find them under other names.

    Raises:
        ParallelConfigError: It lacks keys, has others or other shapes; lists them.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    lines = [
        f"{title} ({len(found)}): {', '.join(found)}"
        for title, found in _problems(model, tensors, entries).items()
        if found
    ]
    if lines:
        msg = f"the checkpoint does not fit {type(model).__name__}:\n  " + "\n  ".join(lines)
        if lines[0].startswith("missing") and hasattr(model, "base_model_prefix"):
            msg += f"\n  {advice}"
        raise ParallelConfigError(msg)
    return {key: entry for key, entry in sorted(entries.items()) if key in tensors}


def _problems(
    model: nn.Module, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> dict[str, list[str]]:
    filled = {id(tensors[key]) for key in entries.keys() & tensors.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    both = [(key, entry, tensors[key]) for key, entry in sorted(entries.items()) if key in tensors]
    return {
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
