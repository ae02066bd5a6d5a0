"""One module of a plan: which of its inputs and outputs are split or gathered."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_sp.application import Application
from omni_sp.plan_entries import OPTIONAL, InputPlan, OutputPlan, SequenceParallelInput
from omni_sp.planned_call import Entry, Items, PlannedCall
from omni_sp.region import ShardedRegion

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class PlannedModule:
    """Applies the entries of a plan to the calls of a module.

    Args:
        name: Name of the module in the model; ``""`` for the model itself.
        module: The module.
        application: Knows the region of the call that is under way; none to check a plan only.

    Raises:
        ParallelConfigError: An entry names a parameter that the module's ``forward`` lacks.
    """

    def __init__(
        self, name: str, module: nn.Module, application: Application | None = None
    ) -> None:
        self._application = application
        self._name = name
        self._class = type(module).__name__
        self._where = f"module {name!r}" if name else f"model {self._class}"
        self._positions = {
            key: index if parameter.kind in _POSITIONAL else sys.maxsize
            for index, (key, parameter) in enumerate(
                inspect.signature(module.forward).parameters.items()
            )
        }
        self._inputs: dict[str, Entry | Items] = {}
        self._outputs: dict[int, Entry | Items] = {}

    @property
    def has_inputs(self) -> bool:
        """Whether any input is planned."""
        return bool(self._inputs)

    @property
    def has_outputs(self) -> bool:
        """Whether any output is planned."""
        return bool(self._outputs)

    def add(self, entry: InputPlan | OutputPlan) -> None:
        """Take one more entry of the plan for this module.

        Raises:
            ParallelConfigError: It names a parameter that ``forward`` lacks, or one that has an
                entry already.
        """
        if not isinstance(entry, Mapping):
            gathers = entry if isinstance(entry, tuple) else (entry,)
            for index, join in enumerate(gathers):
                if join is not None:
                    self._put(self._outputs, index, join)
            return
        for key, split in entry.items():
            if isinstance(key, int):
                self._put(self._outputs, key, split)
                continue
            if key.endswith(OPTIONAL):
                key = key.removesuffix(OPTIONAL)  # noqa: PLW2901
                if key not in self._positions:
                    continue
            for needed in (key, getattr(split, "unit", None), getattr(split, "text_len_source", 0)):
                self._check_parameter(needed)
            self._put(self._inputs, key, split)
        # Streams first: what goes with one refers to it.
        self._inputs = dict(sorted(self._inputs.items(), key=lambda item: not _attends(item[1])))

    def _put(self, into: dict[Any, Any], key: object, entry: object) -> None:
        if key in into and into[key] != entry:
            msg = (
                f"the plan has two entries for {key!r} of {self._where}: {into[key]} and {entry}; "
                "several names stand for this module; keep one"
            )
            raise ParallelConfigError(msg)
        into[key] = entry

    def _check_parameter(self, key: object) -> None:
        if isinstance(key, str) and key not in self._positions:
            msg = (
                f"the plan names the parameter {key!r} of {self._where}, a {self._class}, whose "
                f"forward takes: {', '.join(self._positions)}"
            )
            raise ParallelConfigError(msg)

    # -- a call ----------------------------------------------------------------------------

    def split_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with this rank's shards in place of the planned tensors.

        Raises:
            ParallelError: An argument is no tensor, or has other dimensions than planned.
        """
        region = self._region()
        changed, named = list(args), dict(kwargs)
        for key, plan in self._inputs.items():
            value = self._argument(key, args, kwargs)
            if value is None:
                continue  # an optional input that this call does without
            where = f"{self._where}, parameter {key!r}"
            call = PlannedCall(region, where, key, lambda name: self._argument(name, args, kwargs))
            local = call.change(value, plan)
            index = self._positions[key]
            if index < len(changed):
                changed[index] = local
            else:
                named[key] = local
        return tuple(changed), named

    def change_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of a call, split or gathered as planned.

        Raises:
            ParallelError: A planned output is missing, no tensor, or of other dimensions.
        """
        region = self._region()
        values, rebuild = _items_of(output, self._where)
        highest = max(self._outputs)
        if highest >= len(values):
            msg = f"{self._where}: the plan names output {highest}; found {len(values)} outputs"
            raise ParallelError(msg)
        for index, plan in self._outputs.items():
            if values[index] is None:
                continue
            where = f"{self._where}, output {index}"
            name = f"{self._name}.{index}"
            call = PlannedCall(region, where, name, lambda key: self._argument(key, args, kwargs))
            values[index] = call.change(values[index], plan)
        return rebuild(values)

    def _argument(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self._positions[key]
        return args[index] if index < len(args) else kwargs.get(key)

    def _region(self) -> ShardedRegion:
        region = None if self._application is None else self._application.region
        if region is None:
            msg = f"{self._where} was called outside its sequence-parallel model; call the model"
            raise ParallelError(msg)
        return region


def _attends(plan: object) -> bool:
    items = plan if isinstance(plan, tuple) else (plan,)
    return any(isinstance(item, SequenceParallelInput) and item.attends for item in items)


def _items_of(output: Any, where: str) -> tuple[list[Any], Any]:
    """The items of a module's output, and how to make such an output of other items."""
    if isinstance(output, Tensor):
        return [output], lambda values: values[0]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(output), type(output)._make  # type: ignore[attr-defined]
    if type(output) in (tuple, list):
        return list(output), type(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = [field.name for field in dataclasses.fields(output)]
        values = [getattr(output, name) for name in fields]
        return values, lambda new: dataclasses.replace(
            output, **dict(zip(fields, new, strict=True))
        )
    msg = (
        f"{where}: expected a tensor, tuple, list or dataclass as output; found "
        f"{type(output).__name__}"
    )
    raise ParallelError(msg)
