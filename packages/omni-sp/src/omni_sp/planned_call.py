"""One planned value of one call of a module: what this rank works on in its place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_sp.joining import check_dims
from omni_sp.plan_entries import (
    REST,
    AnySequenceParallelInput,
    SequenceParallelConcatInput,
    SequenceParallelCount,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    SequenceParallelRefusal,
)
from omni_sp.region import ShardedRegion

Entry = AnySequenceParallelInput | SequenceParallelOutput
Items = tuple[Entry | None, ...]


@dataclasses.dataclass(frozen=True)
class PlannedCall:
    """A value of a call that a plan has an entry for."""

    region: ShardedRegion
    """What is sharded in this call of the model."""
    where: str
    """Module and parameter, for messages."""
    name: str
    """By which streams and masks refer to it."""
    argument: Any
    """Gives another argument of the call, by its name."""

    def change(self, value: Any, plan: Entry | Items) -> Any:
        """The value as this rank works on it."""
        if not isinstance(plan, tuple):
            if isinstance(value, dict):
                return {
                    key: self._change(item, plan, f"{self.name}.{key}", f"{self.where}, item {key}")
                    for key, item in value.items()
                    if item is not None
                }
            if not isinstance(value, tuple | list):
                return self._change(value, plan, self.name, self.where)
            plan = (plan,) * len(value)
        if not isinstance(value, tuple | list) or len(value) != len(plan):
            found = (
                f"{len(value)} items" if isinstance(value, tuple | list) else type(value).__name__
            )
            msg = f"{self.where}: expected a tuple or list of {len(plan)} items; found {found}"
            raise ParallelError(msg)
        return type(value)(
            item
            if one is None or item is None
            else self._change(item, one, f"{self.name}.{i}", f"{self.where}, item {i}")
            for i, (item, one) in enumerate(zip(value, plan, strict=True))
        )

    def _change(self, value: Any, plan: Entry, name: str, where: str) -> Any:
        if isinstance(plan, SequenceParallelRefusal):
            msg = f"{where}: {plan.reason}"
            raise ParallelConfigError(msg)
        if isinstance(plan, SequenceParallelCount):
            return self._count(value, plan, where)
        if not isinstance(value, Tensor):
            msg = f"{where}: expected a tensor; found {type(value).__name__}"
            raise ParallelError(msg)
        if isinstance(plan, SequenceParallelOutput):
            return self.region.join(value, plan, where)
        if isinstance(plan, SequenceParallelPartialInput):
            return self._partial(value, plan, where)
        if isinstance(plan, SequenceParallelConcatInput):
            return self._concatenated(value, plan, where)
        return self.region.split(value, plan, name, where, self._integer(plan.unit, where))

    def _integer(self, name: str | None, where: str) -> int:
        if name is None:
            return 1
        value = self.argument(name)
        if isinstance(value, Tensor):
            value = value.shape[-1]
        if not isinstance(value, int):
            msg = f"{where}: expected the parameter {name!r} to be an integer; found {value!r}"
            raise ParallelError(msg)
        return value

    def _count(self, value: Any, plan: SequenceParallelCount, where: str) -> int:
        if not isinstance(value, int):
            msg = f"{where}: expected an integer; found {type(value).__name__}"
            raise ParallelError(msg)
        unit = self._integer(plan.unit, where)
        piece = self.region.piece(self.region.stream(plan.like, where).segment)
        runs = [(min(run.start, value * unit), min(run.stop, value * unit)) for run in piece.runs]
        return sum(stop - start for start, stop in runs) // unit

    def _partial(self, value: Tensor, plan: SequenceParallelPartialInput, where: str) -> Tensor:
        check_dims(value, plan.split_dim, plan.expected_dims, where)
        source: Any = plan.text_len_source
        if isinstance(source, str):
            source = self.argument(source)
            if isinstance(source, Tensor):
                source = source.shape[0]
        if not isinstance(source, int):
            msg = (
                f"{where}: the length of the text comes from {plan.text_len_source!r}; expected a "
                f"number or a tensor there; found {type(source).__name__}"
            )
            raise ParallelError(msg)
        length = value.shape[plan.split_dim]
        if not 0 <= source <= length:
            msg = (
                f"{where}: a text of {source} tokens in a tensor of {length}; legal: 0 to {length}"
            )
            raise ParallelError(msg)
        text, image = torch.split(value, [source, length - source], plan.split_dim)
        segment = self.region.new_segment(length - source, False, 1, where)
        mine = self.region.shard(image, plan.split_dim, segment)
        return torch.cat([text, mine], plan.split_dim)

    def _concatenated(self, value: Tensor, plan: SequenceParallelConcatInput, where: str) -> Tensor:
        check_dims(value, plan.split_dim, plan.expected_dims, where)
        dim = plan.split_dim
        known = {
            name: self.region.stream(name, where).segment for name in plan.streams if name != REST
        }
        rest = value.shape[dim] - sum(segment.length for segment in known.values())
        if rest < 0 or (rest > 0 and REST not in plan.streams):
            msg = (
                f"{where}: expected {' + '.join(str(s.length) for s in known.values())} tokens in "
                f"dimension {dim}, those of {', '.join(known)}; found shape {tuple(value.shape)}"
            )
            raise ParallelError(msg)
        segments = [known.get(name) for name in plan.streams]
        parts = torch.split(value, [rest if s is None else s.length for s in segments], dim)
        mine = [
            part if segment is None else self.region.shard(part, dim, segment)
            for part, segment in zip(parts, segments, strict=True)
        ]
        return torch.cat(mine, dim)
