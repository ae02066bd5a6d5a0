"""Values from files for tensors of a model that has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from omni_parallel_state.checkpoints.files import Entry, by_file, open_file, read_rows

_Places = dict[int, list[tuple[dict[str, Any], str]]]


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    device: torch.device,
    elsewhere: Iterable[nn.Module] = (),
) -> None:
    """Give parameters and buffers of a model their values, on a device, in memory of their own.

    Each is replaced wherever it stands, so that what is tied stays tied, and keeps the dtype that
    it has. Buffers that are in no file have values, and are moved.

    Args:
        model: What there is of a model. Only tensors that stand in it are read.
        tensors: The tensors of the whole model by the keys of the checkpoint.
        entries: Where the values are; each key is one of ``tensors``.
        device: Where the values go.
        elsewhere: Modules that may share tensors with the model.
    """
    places = _places([model])
    for shared, found in _places(elsewhere).items():
        if shared in places:
            places[shared] += found
    needed = {key: entry for key, entry in entries.items() if id(tensors[key]) in places}
    for file, keys in by_file(needed):
        with open_file(file) as opened:
            for key in keys:
                old = tensors[key]
                if (where := places.pop(id(old), None)) is None:
                    continue  # tied to a key that was read
                # What is read lies in the file, at addresses where kernels round otherwise.
                read = read_rows(opened, entries[key], None)
                _put(where, old, read.to(device, old.dtype, copy=True))
    for where in places.values():
        held, name = where[0]
        if not held[name].is_meta and held[name].device != device:
            _put(where, held[name], held[name].detach().to(device))


def _places(modules: Iterable[nn.Module]) -> _Places:
    """Where each parameter and buffer stands."""
    found: _Places = {}
    for outer in modules:
        for module in outer.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        found.setdefault(id(tensor), []).append((held, name))
    return found


def _put(places: list[tuple[dict[str, Any], str]], old: Tensor, value: Tensor) -> None:
    if isinstance(old, nn.Parameter):
        parameter = nn.Parameter(value, requires_grad=old.requires_grad)
        parameter.__dict__.update(old.__dict__)
        value = parameter
    for held, name in places:
        held[name] = value
