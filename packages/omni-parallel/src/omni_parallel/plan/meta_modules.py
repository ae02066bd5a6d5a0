"""Modules without memory, made of their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from omni_group_coordinator import ParallelConfigError


def meta_module(folder: Path, library: str, name: str, dtype: torch.dtype) -> nn.Module:
    """A module of a class of diffusers or transformers, on the meta device.

    Raises:
        ParallelConfigError: There is no such class, or it cannot be made of that configuration.
    """
    try:
        module = _made(folder, library, name)
    except Exception as error:
        msg = f"cannot make a {library}.{name} of {folder / 'config.json'}: {error}"
        raise ParallelConfigError(msg) from error
    for tensor in (*module.parameters(), *module.buffers()):  # not to(), which warns of float32
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module.eval()


def is_module(library: str, name: str) -> bool:
    """Whether a component is a module of diffusers or transformers."""
    found = _class(library, name)
    return isinstance(found, type) and issubclass(found, nn.Module)


def _class(library: str, name: str) -> object:
    if library not in ("diffusers", "transformers"):
        return None
    try:
        return getattr(__import__(library), name, None)
    except ImportError:  # classes that need what is not installed
        return None


def _made(folder: Path, library: str, name: str) -> nn.Module:
    found = _class(library, name)
    if found is None:
        msg = f"the {library} that is installed has no {name}"
        raise ParallelConfigError(msg)
    with torch.device("meta"):
        if library == "diffusers":
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            module: nn.Module = found.from_config(config)  # type: ignore[attr-defined]
            return module
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return found(config)  # type: ignore[operator, no-any-return]
