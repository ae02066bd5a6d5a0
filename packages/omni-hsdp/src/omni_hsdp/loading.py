"""Loads a model so that no rank ever holds all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from omni_group_coordinator import GroupCoordinator
from omni_hsdp.conditions import Condition
from omni_hsdp.hsdp import Policy, apply_on, finish
from omni_hsdp.hsdp_config import HSDPInferenceConfig, check_config
from omni_hsdp.placement import Placement, placement_of
from omni_hsdp.renaming import renamed
from omni_hsdp.sharded_model import ShardedModel, find_record, forget
from omni_parallel_state import ParallelState
from omni_parallel_state.checkpoints.dtypes import PLAIN_DTYPES
from omni_parallel_state.checkpoints.files import (
    Entry,
    by_file,
    checkpoint_entries,
    open_file,
    read_rows,
)
from omni_parallel_state.checkpoints.matching import matched
from omni_parallel_state.checkpoints.skeleton import build_skeleton
from omni_parallel_state.checkpoints.together import together

ModelT = TypeVar("ModelT", bound=nn.Module)
_ADVICE = (
    "keys are renamed as the model's class says, and tensors are read as they are; if "
    "from_pretrained() does more for this class, load with it and call apply_hsdp_to_model()"
)


class ShardingOptions(TypedDict, total=False):
    """The keyword arguments of `apply_hsdp_to_model`."""

    state: ParallelState | None
    mesh: DeviceMesh | None
    conditions: Iterable[Condition | str] | str | None
    ignored_modules: Iterable[str] | None
    policy: Policy


def load_hsdp_model(
    cls: Callable[..., ModelT],
    path: str | Path,
    hsdp_config: HSDPInferenceConfig,
    *,
    subfolder: str = "",
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    **sharding: Unpack[ShardingOptions],
) -> ModelT:
    """Load a model from safetensors files: each rank reads its share of the weights and no more.

    The model is that of ``cls.from_pretrained`` followed by `apply_hsdp_to_model`. Every rank of
    the group makes the same call; an error on one of them is raised on all.

    Args:
        cls: A model class of diffusers or transformers, or whatever makes a module when it is
            called without arguments.
        path: Folder on this machine, as ``save_pretrained`` writes it: one file, or an index
            and the files that it names.
        hsdp_config: Sizes and dtypes; see its ``param_dtype`` before loading in float32.
        subfolder: Of `path`, such as ``"transformer"``.
        variant: Of the files, such as ``"fp16"``.
        dtype: Of the weights, but for what the class keeps in float32. Default: as for
            ``from_pretrained``.
        torch_dtype: Another name of `dtype`.
        sharding: ``state``, ``mesh``, ``conditions``, ``ignored_modules`` and ``policy``, as of
            `apply_hsdp_to_model`.

    Returns:
        The sharded model, in evaluation mode.

    Raises:
        ParallelConfigError: What `apply_hsdp_to_model` raises; files that are missing or
            damaged; keys that the checkpoint lacks or has in excess, or tensors of other shapes,
            all of them listed; or a package that is not installed.
        ParallelError: Another rank could not load.
    """
    check_config(hsdp_config)
    placement = placement_of(hsdp_config, sharding.get("state"), sharding.get("mesh"))
    folder = Path(path) / subfolder
    ranks = placement.ranks() if placement.shard > 1 else None
    group = None if ranks is None else ranks.group

    def prepare() -> tuple[ModelT, dict[str, Entry]]:
        entries = checkpoint_entries(folder, variant)  # first, for its words on a wrong path
        model = build_skeleton(cls, folder, dtype or torch_dtype)
        return model, matched(model, renamed(model, entries), _ADVICE)  # type: ignore[return-value]

    try:
        with torch.inference_mode(False), torch.no_grad():
            model, entries = together(group, "prepare to load", prepare)
            _shard_and_fill(model, entries, hsdp_config, placement, group, sharding)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    return model


def _shard_and_fill(
    model: nn.Module,
    entries: dict[str, Entry],
    config: HSDPInferenceConfig,
    placement: Placement,
    group: GroupCoordinator | None,
    sharding: ShardingOptions,
) -> None:
    tensors = model.state_dict(keep_vars=True)
    asked, ignored = sharding.get("conditions"), sharding.get("ignored_modules")
    policy = sharding.get("policy")

    def shard() -> ShardedModel:
        return apply_on(model, config, placement, asked, ignored, policy)

    try:
        record = together(group, "shard", shard)
        together(group, "load", lambda: _fill(record, tensors, entries))
    except BaseException:
        begun = find_record(model)
        if begun is not None:
            forget(begun)
        raise
    finish(record, config, policy)


def _fill(record: ShardedModel, tensors: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Give a model that has no weights this rank's share of them, and all of what stays whole."""
    from torch.distributed.tensor import DTensor

    shares = {id(p.original): p for p in record.parameters}
    places = _places(record.model)
    for file, keys in by_file(entries):
        with open_file(file) as opened:
            for key in keys:
                tensor, entry = tensors[key], entries[key]
                share = shares.get(id(tensor))
                if share is None:
                    value = read_rows(opened, entry, None)
                    _put_whole(record, tensor, places[id(tensor)], value)
                    continue
                rows = share.rows(record.group.rank_in_group, record.shard)
                old = share.current
                if not isinstance(old, DTensor) or not old.to_local().is_meta:
                    continue  # tied to a key that was read
                local = _copied(
                    read_rows(opened, entry, rows), _home(record, share.block), old.dtype
                )
                new = DTensor.from_local(
                    local,
                    old.device_mesh,
                    old.placements,
                    run_check=False,
                    shape=old.shape,
                    stride=old.stride(),
                )
                share.put(nn.Parameter(new, requires_grad=False))


def _home(record: ShardedModel, block: str) -> torch.device:
    return torch.device("cpu") if block and record.policy.cpu_offload else record.device


def _copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor in memory of its own.

    What is read may lie in the file, whose addresses are such that kernels round otherwise.
    """
    return tensor.to(device, dtype, copy=True)


Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter and buffer that is a plain tensor stands."""
    found: dict[int, list[Place]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                found.setdefault(id(tensor), []).append((module, name))
    return found


def _put_whole(record: ShardedModel, old: Tensor, places: list[Place], value: Tensor) -> None:
    """Put a tensor where another stands: with the dtype of that, if both are numbers."""
    numbers = old.dtype in PLAIN_DTYPES and value.dtype in PLAIN_DTYPES
    value = _copied(value, record.device, old.dtype if numbers else value.dtype)
    for module, name in places:
        if name in module._buffers:
            module._buffers[name] = value
        else:
            if not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
                if isinstance(old, nn.Parameter):
                    record.grads[value] = record.grads.pop(old, old.requires_grad)
                    value.requires_grad_(old.requires_grad)
            module._parameters[name] = value
