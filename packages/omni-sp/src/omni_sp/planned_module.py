"""One module of a plan: which of its inputs and outputs are split or gathered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_sp.region import ShardedRegion, current_region
from omni_sp.sp_plan import InputPlan, OutputPlan, SequenceParallelInput, SequenceParallelOutput


class PlannedModule:
    """Applies the entry of a plan to the calls of a module.

    Args:
        name: Name of the module in the model; ``""`` for the model itself.
        module: The module.
        entry: What the plan says of it.

    Raises:
        ParallelConfigError: The entry names a parameter that the module's ``forward`` lacks.
    """

    def __init__(self, name: str, module: nn.Module, entry: InputPlan | OutputPlan) -> None:
        self._name = name
        self._where = f"module {name!r}" if name else f"model {type(module).__name__}"
        self._positions = {
            key: index for index, key in enumerate(inspect.signature(module.forward).parameters)
        }
        self._inputs: dict[str, SequenceParallelInput] = {}
        self._outputs: dict[int, SequenceParallelInput | SequenceParallelOutput] = {}
        if isinstance(entry, Mapping):
            for key, split in entry.items():
                if isinstance(key, int):
                    self._outputs[key] = split
                else:
                    self._inputs[key] = split
        else:
            gathers = entry if isinstance(entry, tuple) else (entry,)
            self._outputs.update((i, join) for i, join in enumerate(gathers) if join is not None)
        for key in self._inputs:
            if key not in self._positions:
                msg = (
                    f"the plan splits the parameter {key!r} of {self._where}, a "
                    f"{type(module).__name__}, whose forward takes: {', '.join(self._positions)}"
                )
                raise ParallelConfigError(msg)

    def split_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with this rank's shards in place of the planned tensors.

        Raises:
            ParallelError: An argument is no tensor, or has other dimensions than planned.
        """
        changed, named = list(args), dict(kwargs)
        for key, plan in self._inputs.items():
            index = self._positions[key]
            value = changed[index] if index < len(changed) else named.get(key)
            if value is None:
                continue  # an optional input that this call does without
            where = f"{self._where}, parameter {key!r}"
            shard = self._region().split(_tensor(value, where), plan, key, where)
            if index < len(changed):
                changed[index] = shard
            else:
                named[key] = shard
        if self._inputs:
            self._region().check_shares(self._where)
        return tuple(changed), named

    def change_outputs(self, output: Any) -> Any:
        """The output of a call, split or gathered as planned.

        Raises:
            ParallelError: A planned output is missing, no tensor, or of other dimensions.
        """
        if not self._outputs:
            return output
        if isinstance(output, Tensor):
            self._check_indices(1)
            return self._change(0, output)
        if type(output) not in (tuple, list):
            msg = (
                f"{self._where}: expected a tensor, tuple or list as output; found "
                f"{type(output).__name__}. Call the model with return_dict=False"
            )
            raise ParallelError(msg)
        self._check_indices(len(output))
        return type(output)(self._change(index, item) for index, item in enumerate(output))

    def _check_indices(self, count: int) -> None:
        highest = max(self._outputs)
        if highest >= count:
            msg = f"{self._where}: the plan names output {highest}; found {count} outputs"
            raise ParallelError(msg)

    def _change(self, index: int, value: object) -> object:
        plan = self._outputs.get(index)
        if plan is None or value is None:
            return value
        where = f"{self._where}, output {index}"
        tensor = _tensor(value, where)
        if isinstance(plan, SequenceParallelOutput):
            return self._region().join(tensor, plan, where)
        return self._region().split(tensor, plan, f"{self._name}[{index}]", where)

    def _region(self) -> ShardedRegion:
        region = current_region.get()
        if region is None:
            msg = f"{self._where} was called outside its sequence-parallel model; call the model"
            raise ParallelError(msg)
        return region


def _tensor(value: object, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        msg = f"{where}: expected a tensor; found {type(value).__name__}"
        raise ParallelError(msg)
    return value


def find_module(root: nn.Module, name: str) -> nn.Module:
    """The module of this dotted name inside a model.

    Raises:
        ParallelConfigError: There is none; the message lists what there is.
    """
    try:
        return root.get_submodule(name)
    except AttributeError:
        parent = root
        for part in name.split("."):
            children = dict(parent.named_children())
            if part not in children:
                break
            parent = children[part]
        msg = (
            f"the plan names the module {name!r}, which {type(root).__name__} does not have; "
            f"{type(parent).__name__} has: {', '.join(dict(parent.named_children())) or 'none'}"
        )
        raise ParallelConfigError(msg) from None
