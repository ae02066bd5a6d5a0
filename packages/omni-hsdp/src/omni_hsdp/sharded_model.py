"""What is known of a model whose weights are sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from omni_group_coordinator import GroupCoordinator, ParallelConfigError
from omni_hsdp.gather_policy import GatherPolicy
from omni_hsdp.ignored import WholeParameter
from omni_hsdp.placement import Ranks

if TYPE_CHECKING:
    from omni_hsdp.gatherer import Gatherer

_ATTRIBUTE = "_omni_hsdp"


@dataclass
class ShardedParameter:
    """A parameter that is sharded along its first dimension.

    Attributes:
        name: Its dotted name when the model was sharded.
        block: The block that it is gathered with; ``""`` for none.
        original: The parameter that the model had, without its data in the meantime.
        places: Modules that hold it, and under which names.
        requires_grad: Whether the original did.
        shape: Of the whole.
        itemsize: Bytes of one element.
    """

    name: str
    block: str
    original: nn.Parameter
    places: list[tuple[nn.Module, str]]
    requires_grad: bool
    shape: torch.Size
    itemsize: int

    @property
    def current(self) -> nn.Parameter:
        """What the model holds now: the share as a DTensor, or the whole."""
        module, name = self.places[0]
        found: nn.Parameter | None = module._parameters[name]
        if found is None:
            msg = f"{self.name} was taken out of its module after it was sharded"
            raise ParallelConfigError(msg)
        return found

    def put(self, parameter: nn.Parameter) -> None:
        """Have the model hold something else."""
        for module, name in self.places:
            module._parameters[name] = parameter

    def drop_data(self) -> None:
        """Free the memory of the original, once it is sharded."""
        if self.original.is_inference():  # its data cannot be exchanged
            empty = torch.empty(self.shape, dtype=self.original.dtype, device="meta")
            self.original = nn.Parameter(empty, requires_grad=False)
        elif not self.original.is_meta:
            self.original.data = torch.empty(0, dtype=self.original.dtype)

    def restore(self, value: Tensor) -> None:
        """Have the model hold the original again, with a value."""
        if self.original.is_meta:
            self.put(nn.Parameter(value, requires_grad=self.requires_grad))
        else:
            self.original.data = value
            self.original.requires_grad_(self.requires_grad)
            self.put(self.original)

    def rows(self, rank: int, ranks: int) -> slice:
        """Which part of the first dimension one of the ranks has."""
        length = self.shape[0]
        chunk = math.ceil(length / ranks)
        return slice(min(rank * chunk, length), min((rank + 1) * chunk, length))

    def bytes(self, rows: int | None = None) -> int:
        """Size of the whole, or of some rows of it."""
        length = self.shape[0] if rows is None else rows
        return length * math.prod(self.shape[1:]) * self.itemsize


class CastTensor(NamedTuple):
    """A tensor that another dtype stands in for.

    Attributes:
        held: The parameters or buffers of a module.
        name: Its name there.
        original: What was there.
        new: What is there now.
    """

    held: dict[str, Any]
    name: str
    original: Tensor
    new: Tensor


@dataclass
class ShardedModel:
    """A model whose weights are sharded.

    Attributes:
        model: The model.
        replicate: How many sharded copies there are.
        shard: Ranks that share a copy; 1 for a model that is as it was.
        device: Where it computes.
        cast_to: What weights are cast to when they are gathered.
        blocks: What is gathered as one, by name.
        parameters: What is sharded.
        whole: What is not.
        policy: When weights are gathered.
    """

    model: nn.Module
    replicate: int
    shard: int
    device: torch.device
    cast_to: torch.dtype | None
    blocks: dict[str, nn.Module]
    whole: list[WholeParameter]
    policy: GatherPolicy
    parameters: list[ShardedParameter] = field(default_factory=list)
    grads: dict[nn.Parameter, bool] = field(default_factory=dict)
    casts: list[CastTensor] = field(default_factory=list)
    output_hook: RemovableHandle | None = None
    ranks: Ranks | None = None
    gatherer: Gatherer | None = None

    @property
    def group(self) -> GroupCoordinator:
        """The ranks that share this rank's copy."""
        if self.ranks is None:
            msg = "the model is on one rank; there is no group"
            raise ParallelConfigError(msg)
        return self.ranks.group

    def gathered_bytes(self) -> tuple[int, dict[str, int]]:
        """Bytes that are gathered for what is in no block, and for each block."""
        sizes = dict.fromkeys(("", *self.blocks), 0)
        for parameter in self.parameters:
            item = parameter.itemsize if self.cast_to is None else self.cast_to.itemsize
            sizes[parameter.block] += math.prod(parameter.shape) * item
        return sizes.pop(""), sizes

    def whole_value(self, parameter: ShardedParameter) -> Tensor:
        """The whole of a parameter, on the device: a collective of the group."""
        from torch.distributed.tensor import DTensor

        share = parameter.current
        if not isinstance(share, DTensor):
            msg = f"{parameter.name} is gathered at the moment; leave the gathered() block first"
            raise ParallelConfigError(msg)
        rows = [parameter.rows(rank, self.shard) for rank in range(self.shard)]
        return self.group.all_gather(
            share.to_local().detach().to(self.device),
            dim=0,
            lengths=[part.stop - part.start for part in rows],
        )

    def modules(self) -> Iterator[nn.Module]:
        """The blocks and the model, in the order in which they were sharded."""
        yield from reversed(self.blocks.values())
        yield self.model


def remember(record: ShardedModel) -> None:
    """Keep the record with its model."""
    record.model.__dict__[_ATTRIBUTE] = record


def forget(record: ShardedModel) -> None:
    """Drop the record of a model."""
    record.model.__dict__.pop(_ATTRIBUTE, None)


def find_record(model: Any) -> ShardedModel | None:
    """The record of a model, or None if it is not sharded."""
    found = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    return found if isinstance(found, ShardedModel) else None


def record_of(model: Any) -> ShardedModel:
    """The record of a model.

    Raises:
        ParallelConfigError: It is not sharded.
    """
    found = find_record(model)
    if found is None:
        msg = f"this {type(model).__name__} is not sharded; call apply_hsdp_to_model() first"
        raise ParallelConfigError(msg)
    return found
