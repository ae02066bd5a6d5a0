"""Shards the weights of a model over ranks, for inference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import UninitializedParameter

from omni_group_coordinator import ParallelConfigError
from omni_hsdp.casting import cast_buffers, cast_on_one_rank
from omni_hsdp.conditions import Condition, find_blocks
from omni_hsdp.fsdp_internals import is_part
from omni_hsdp.gather_policy import GatherPolicy
from omni_hsdp.gathering import choose_policy, set_policy
from omni_hsdp.hsdp_config import HSDPInferenceConfig, check_config
from omni_hsdp.ignored import gather_dtype, ignored_modules, whole_parameters
from omni_hsdp.placement import Placement, placement_of
from omni_hsdp.sharded_model import ShardedModel, find_record, record_of, remember
from omni_hsdp.sharding import check_removable, shard, unshard
from omni_parallel_state import Handle, ParallelState

Policy = GatherPolicy | Literal["auto"] | None


def apply_hsdp_to_model(
    model: nn.Module,
    hsdp_config: HSDPInferenceConfig,
    *,
    state: ParallelState | None = None,
    mesh: DeviceMesh | None = None,
    conditions: Iterable[Condition | str] | str | None = None,
    ignored_modules: Iterable[str] | None = None,
    policy: Policy = None,
) -> nn.Module:
    """Shard the weights of a model that is loaded: each rank keeps a share of every block.

    The model is changed in place and works as before; its outputs are the same bit for bit, on
    every rank. Each rank of the group calls it equally often, without gradients. Parameters that
    are added later, such as those of adapters, stay whole. Every rank makes the same call, with
    the same model; what cannot work raises on all of them, before they communicate.

    Args:
        model: The model, with its weights, on any device. `load_hsdp_model` shards while loading.
        hsdp_config: Sizes and dtypes.
        state: The ranks; default: the current state.
        mesh: The ranks as a mesh of torch, in place of a state: dimensions
            ``("replicate", "shard")`` or ``("shard",)``.
        conditions: Which modules are blocks, gathered as one: callables of name and module, or
            patterns such as ``"transformer_blocks.*"``. Default: the model's attribute
            ``_hsdp_shard_conditions``; without it, what repeats in the model.
        ignored_modules: Dotted names of modules that stay whole; default: the model's attribute
            ``_hsdp_ignored_modules``.
        policy: When blocks are gathered. Default: each shortly before its forward, and given up
            after it unless ``reshard_after_forward`` is False. ``"auto"``: by the memory that is
            free after sharding (a collective); see `choose_policy`.

    Returns:
        The model. `remove_hsdp` undoes it, and `handle_of` gives a handle that does so.

    Raises:
        ParallelConfigError: Not enabled, sizes that do not multiply to the ranks, no module that
            is a block, a dtype that weights cannot have, or a model that is sharded already.
        ParallelError: No state was given and none is current.
    """
    check_config(hsdp_config)
    check_model(model)
    placement = placement_of(hsdp_config, state, mesh)
    with torch.inference_mode(False), torch.no_grad():
        record = apply_on(model, hsdp_config, placement, conditions, ignored_modules, policy)
        finish(record, hsdp_config, policy)
    return model


def apply_on(
    model: nn.Module,
    config: HSDPInferenceConfig,
    placement: Placement,
    conditions: Iterable[Condition | str] | str | None,
    ignored: Iterable[str] | None,
    policy: Policy,
) -> ShardedModel:
    """Shard a model, or one without values, as a configuration says that was checked.

    `finish` is to follow, once the values are there.
    """
    given = _checked_policy(policy, config, placement.shard)
    blocks = find_blocks(model, conditions)
    cast_to = gather_dtype(model, config.param_dtype)
    whole = whole_parameters(model, blocks, ignored_modules(model, ignored), cast_to)
    record = ShardedModel(
        model=model,
        replicate=placement.replicate,
        shard=placement.shard,
        device=placement.device,
        cast_to=cast_to,
        blocks=dict(_with_something_to_shard(blocks, set(whole))),
        whole=list(whole.values()),
        policy=given,
    )
    if placement.shard > 1:
        ranks = placement.ranks()
        try:
            shard(record, ranks, set(whole), config.output_dtype)
        except BaseException:
            ranks.close()
            raise
    remember(record)
    return record


def finish(record: ShardedModel, config: HSDPInferenceConfig, policy: Policy) -> None:
    """Do to a model what wants its values."""
    cast_buffers(record)
    if record.shard == 1:
        cast_on_one_rank(record, config.output_dtype)
    if policy == "auto":
        set_policy(record.model, choose_policy(record.model))


def check_model(model: nn.Module) -> None:
    """Check that a model has its weights, and has them whole.

    Raises:
        ParallelConfigError: It is sharded, or a module or a parameter of it is; or parameters
            have no values.
    """
    for name, module in model.named_modules():
        record = find_record(module)
        if record is not None:
            msg = (
                f"{name or 'this'}, a {type(module).__name__}, is sharded over {record.shard} "
                "ranks already; call remove_hsdp() on it first"
            )
            raise ParallelConfigError(msg)
    if is_part(model):
        msg = (
            f"this {type(model).__name__} is part of a model that is sharded already; call "
            "remove_hsdp() on that, or shard it with conditions= that name this part"
        )
        raise ParallelConfigError(msg)
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            msg = f"{name} is distributed already; shard a model once, and before anything else"
            raise ParallelConfigError(msg)
        if parameter.is_meta or isinstance(parameter, UninitializedParameter):
            msg = (
                f"{name} has no values yet; load the weights first, call a model with lazy "
                "parameters once, or let load_hsdp_model() shard while it loads"
            )
            raise ParallelConfigError(msg)


def remove_hsdp(model: nn.Module) -> nn.Module:
    """Give every rank the whole model back, bit for bit as it was: parameters, classes, hooks.

    A collective of the ranks that share the weights. Parameters are on the device of the rank.

    Args:
        model: A model that `apply_hsdp_to_model` or `load_hsdp_model` returned.

    Raises:
        ParallelConfigError: It is not sharded.
        ParallelError: Another strategy was put on top since; remove that first.
    """
    record = record_of(model)
    with torch.inference_mode(False), torch.no_grad():
        unshard(record)
    return model


class ShardedHandle(Handle):
    """Undoes the sharding of some models; a `remove` that raises can be called again."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = list(models)
        super().__init__(self._remove_all)

    def remove(self) -> None:
        """Give every rank the whole models back; a second call does nothing.

        Raises:
            ParallelError: Another strategy was put on top since; remove that first.
        """
        for model in self._models:
            if (record := find_record(model)) is not None:
                check_removable(record)
        super().remove()

    def _remove_all(self) -> None:
        while self._models:
            model = self._models.pop()
            if find_record(model) is not None:
                remove_hsdp(model)


def handle_of(model: nn.Module) -> Handle:
    """A handle whose `remove`, or end of its ``with`` block, calls `remove_hsdp`.

    Raises:
        ParallelConfigError: The model is not sharded.
    """
    record_of(model)
    return ShardedHandle([model])


def _checked_policy(policy: Policy, config: HSDPInferenceConfig, shard: int) -> GatherPolicy:
    """The policy to begin with."""
    if policy not in (None, "auto") and not isinstance(policy, GatherPolicy):
        msg = f"policy={policy!r}; legal: a GatherPolicy, 'auto', or None"
        raise ParallelConfigError(msg)
    if not isinstance(policy, GatherPolicy):
        return GatherPolicy(keep="none" if config.reshard_after_forward else "all")
    if policy.cpu_offload and shard == 1:
        msg = (
            "cpu_offload=True: one rank has no shares that could be in host memory; legal: a "
            "policy without it, or a hsdp_shard_size of 2 and above"
        )
        raise ParallelConfigError(msg)
    return policy


def _with_something_to_shard(
    blocks: list[tuple[str, nn.Module]], whole: set[nn.Parameter]
) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in blocks
        if any(parameter not in whole for parameter in module.parameters())
    ]
