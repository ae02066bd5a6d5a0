"""Puts torch's ``fully_shard`` on a model, and takes it off.

torch's FSDP and its DTensor take most of a second to import. This package imports them where it
shards, not where it is imported: a program that may shard does not wait for what it does not use.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import nn

from omni_group_coordinator import ParallelError
from omni_hsdp.casting import restore_casts
from omni_hsdp.fsdp_internals import can_remove, keep_class_name, remove_fully_shard
from omni_hsdp.gatherer import Gatherer
from omni_hsdp.grad_flags import GradFlags
from omni_hsdp.ignored import owners_of
from omni_hsdp.placement import Ranks
from omni_hsdp.sharded_model import ShardedModel, ShardedParameter, forget

if TYPE_CHECKING:
    from torch.distributed.fsdp import OffloadPolicy


def shard(
    record: ShardedModel,
    ranks: Ranks,
    whole: set[nn.Parameter],
    output_dtype: torch.dtype | None,
) -> None:
    """Shard a model as its record says, block by block.

    Args:
        record: Is completed.
        ranks: Those that share the weights.
        whole: Parameters that stay whole.
        output_dtype: What floating-point outputs of the model are cast to.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model, names = record.model, {id(module): name for name, module in record.blocks.items()}
    record.ranks = ranks
    record.grads = {p: p.requires_grad for p in whole}
    record.parameters = sharded_parameters(model, list(record.blocks), whole)
    model.requires_grad_(False)
    of_root = {p.original for p in record.parameters if not p.block}
    for module in record.modules():
        name = names.get(id(module), "")
        fully_shard(
            module,
            mesh=ranks.mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=record.cast_to,
                output_dtype=None if name else output_dtype,
                cast_forward_inputs=False,
            ),
            offload_policy=_offload(record) if name else OffloadPolicy(),
            ignored_params=whole | of_root if name else whole,
        )
        keep_class_name(module)
        for parameter in record.parameters:
            if parameter.block == name:
                parameter.drop_data()
    for tensor in (*whole, *model.buffers()):
        if not tensor.is_meta and tensor.device != record.device:
            tensor.data = tensor.data.to(record.device)
    flags = GradFlags(record.parameters, record.grads)
    record.gatherer = Gatherer(model, record.blocks, record.policy, flags)


def _offload(record: ShardedModel) -> OffloadPolicy:
    """Where the shares of blocks are; those of the rest stay on the device.

    Pipelines ask a model for its device, and get that of its first parameter.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not record.policy.cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=record.device.type != "cpu")


def sharded_parameters(
    model: nn.Module, blocks: list[str], whole: set[nn.Parameter]
) -> list[ShardedParameter]:
    """The parameters of a model that are not to stay whole, as they are before."""
    owners = owners_of(model, blocks)
    found: dict[nn.Parameter, ShardedParameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in whole:
                continue
            if parameter not in found:
                found[parameter] = ShardedParameter(
                    name=f"{prefix}.{name}" if prefix else name,
                    block="" if "" in owners[parameter] else next(iter(owners[parameter])),
                    original=parameter,
                    places=[],
                    requires_grad=parameter.requires_grad,
                    shape=parameter.shape,
                    itemsize=parameter.itemsize,
                )
            found[parameter].places.append((module, name))
    return list(found.values())


def check_removable(record: ShardedModel) -> None:
    """Check that nothing was put on top of the sharding.

    Raises:
        ParallelError: Something changed the class of a module since, or it is in use.
    """
    if record.gatherer is not None and record.gatherer.gathered:
        msg = "the model is gathered at the moment; leave the gathered() block first"
        raise ParallelError(msg)
    for name, module in (*record.blocks.items(), ("", record.model)):
        if record.ranks is not None and not can_remove(module):
            msg = (
                f"{name or 'the model'} got another class after it was sharded "
                f"({type(module).__mro__[0].__name__}); remove what did so first"
            )
            raise ParallelError(msg)


def unshard(record: ShardedModel) -> None:
    """Give every rank the whole model, as it was before: a collective of the group.

    Raises:
        ParallelError: As `check_removable` does.
    """
    from torch.distributed.tensor import DTensor

    check_removable(record)
    forget(record)
    restore_casts(record)
    if record.ranks is None or record.gatherer is None:
        return
    record.gatherer.release()
    record.gatherer.detach()
    for parameter in record.parameters:
        if not isinstance(parameter.current, DTensor):
            continue  # somebody put another in its place
        value = record.whole_value(parameter)
        parameter.restore(value)
    for module in list(record.model.modules()):
        remove_fully_shard(module)
    for held, requires_grad in record.grads.items():
        if held.requires_grad is not requires_grad and not held.is_inference():
            held.requires_grad_(requires_grad)
    record.ranks.close()
    gc.collect()  # torch's records refer to each other, and hold the shares
