"""Checking a plan, alone and against a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_sp.plan_entries import (
    OPTIONAL,
    REST,
    AnySequenceParallelInput,
    SequenceParallelAttention,
    SequenceParallelConvolution,
    SequenceParallelInput,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
)

_INPUTS = get_args(AnySequenceParallelInput)


def validate_sp_plan(plan: SequenceParallelModelPlan, model: nn.Module | None = None) -> None:
    """Check a plan; with a model, that it has the modules, parameters and attention named.

    Args:
        plan: The plan.
        model: The model that it is for.

    Raises:
        ParallelConfigError: With everything that is wrong, by module and entry.
    """
    if not isinstance(plan, Mapping):
        msg = f"a sequence-parallel plan is a dict by module name; got a {type(plan).__name__}"
        raise ParallelConfigError(msg)
    problems = [problem for name, entry in plan.items() for problem in _problems(name, entry)]
    if not problems:
        problems = _problems_of_names(plan)
    if not problems and model is not None:
        from omni_sp.applied_plan import problems_with_model

        problems = problems_with_model(plan, model)
    if problems:
        msg = "the sequence-parallel plan cannot work:\n" + "\n".join(f"  {p}" for p in problems)
        raise ParallelConfigError(msg)


def _problems(name: object, entry: object) -> list[str]:
    where = f"module {name!r}"
    if not isinstance(name, str):
        return [f"{where}: a module is named by text"]
    if isinstance(entry, SequenceParallelAttention | SequenceParallelConvolution):
        if isinstance(entry, SequenceParallelAttention):
            return _attention_problems(where, entry)
        return []
    if isinstance(entry, Mapping):
        return [text for key, split in entry.items() for text in _input_problems(where, key, split)]
    outputs = entry if isinstance(entry, tuple) else (entry,)
    if all(output is None or isinstance(output, SequenceParallelOutput) for output in outputs):
        return []
    return [
        f"{where}: {entry!r} is none of: a dict of inputs, a SequenceParallelOutput or a tuple of "
        "these and None, a SequenceParallelAttention, a SequenceParallelConvolution"
    ]


def _attention_problems(where: str, entry: SequenceParallelAttention) -> list[str]:
    problems = []
    if entry.kind == "linear" and (len(entry.streams) != 1 or entry.kv_streams is not None):
        problems.append(f"{where}: linear attention attends over exactly one named stream")
    for streams in (entry.streams, entry.kv_streams or ()):
        if streams.count(REST) > 1:
            problems.append(f"{where}: '*' stands for the rest, which there is once: {streams}")
    if entry.masks and any(name not in (entry.kv_streams or entry.streams) for name in entry.masks):
        problems.append(
            f"{where}: masks {dict(entry.masks)} are for streams of the keys; name these"
        )
    return problems


def _input_problems(where: str, key: object, entry: object) -> list[str]:
    items = entry if isinstance(entry, tuple) else (entry,)
    kept = [item for item in items if item is not None]
    if not isinstance(key, str | int) or isinstance(key, bool):
        return [f"{where}, {key!r}: an entry is named by parameter or by index of the output"]
    if not kept or not all(isinstance(item, _INPUTS) for item in kept):
        return [f"{where}, {key!r}: {entry!r} is no SequenceParallelInput, nor a tuple of these"]
    if isinstance(key, int) and key < 0:
        return [f"{where}, {key!r}: outputs are counted from 0"]
    problems = []
    for item in kept:
        output = getattr(item, "split_output", False)
        if output != isinstance(key, int):
            problems.append(
                f"{where}, {key!r}: an output is named by its index with split_output=True, an "
                "input by its parameter with split_output=False"
            )
        if isinstance(item, SequenceParallelInput):
            problems += _clashes(f"{where}, {key!r}", item)
        if isinstance(item, SequenceParallelPartialInput):
            source = item.text_len_source
            if isinstance(source, int) and source < 0:
                problems.append(
                    f"{where}, {key!r}: text_len_source={source!r}; legal: a length of 0 or more, "
                    "or the name of a parameter"
                )
        dim, dims = getattr(item, "split_dim", 0), getattr(item, "expected_dims", None)
        if dims is not None and not -dims <= dim < dims:
            problems.append(f"{where}, {key!r}: split_dim={dim} of {dims} dimensions")
    return problems


def _clashes(where: str, item: SequenceParallelInput) -> list[str]:
    problems = []
    if item.like is not None and (item.attends or item.auto_pad or item.unit):
        problems.append(
            f"{where}: like={item.like!r} splits as that stream is split, so attends, auto_pad and "
            "unit are said there"
        )
    if item.auto_pad and item.unit:
        problems.append(f"{where}: auto_pad pads single tokens; with unit= shards are uneven")
    return problems


def _problems_of_names(plan: SequenceParallelModelPlan) -> list[str]:
    """What refers to streams that the plan does not split, or what is missing altogether."""
    named = dict(_named_inputs(plan))
    names = set(named)
    problems = []
    if not any(item.attends for item in named.values()):
        problems.append("no input has attends=True, so nothing says which tokens attend")
    if not any(isinstance(entry, SequenceParallelOutput | tuple) for entry in plan.values()):
        problems.append("nothing is gathered: no module has a SequenceParallelOutput")
    for module, name in _references(plan):
        if name not in names:
            problems.append(
                f"module {module!r}: refers to {name!r}; the plan splits: "
                f"{', '.join(sorted(names)) or 'nothing'}"
            )
    return problems


def _named_inputs(plan: SequenceParallelModelPlan) -> Iterator[tuple[str, SequenceParallelInput]]:
    """The inputs by the names under which the rest of a plan refers to them."""
    for module, entry in plan.items():
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            name = f"{module}.{key}" if isinstance(key, int) else key.removesuffix(OPTIONAL)
            if isinstance(value, SequenceParallelInput):
                yield name, value
            for index, item in enumerate(value if isinstance(value, tuple) else ()):
                if isinstance(item, SequenceParallelInput):
                    yield f"{name}.{index}", item


def _references(plan: SequenceParallelModelPlan) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for module, entry in plan.items():
        if isinstance(entry, SequenceParallelAttention):
            named = [*entry.streams, *(entry.kv_streams or ()), *entry.masks.values()]
            found += [(module, name) for name in named]
            continue
        values = list(entry.values()) if isinstance(entry, Mapping) else [entry]
        for value in values:
            for item in value if isinstance(value, tuple) else (value,):
                found += [(module, name) for name in getattr(item, "streams", ())]
                if (like := getattr(item, "like", None)) is not None:
                    found.append((module, like))
    return [(module, name) for module, name in found if name != REST]
