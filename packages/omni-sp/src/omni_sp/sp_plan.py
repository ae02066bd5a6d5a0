"""What to split and gather where: the data that describes a model's sequence parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from omni_group_coordinator import ParallelConfigError


@dataclass(frozen=True)
class SequenceParallelConfig:
    """How the attention of a sharded sequence is computed.

    Raises:
        ParallelConfigError: A degree below 1, or Ring attention, which this version has not.
    """

    ulysses_degree: int = 1
    """Ranks that exchange sequence shards for head shards; 1: none."""
    ring_degree: int = 1
    """Ranks that pass keys and values round a ring. This version has 1 only."""
    convert_to_fp32: bool = True
    """Merge partial attention results in float32. Of use to Ring attention only."""

    def __post_init__(self) -> None:
        for name in ("ulysses_degree", "ring_degree"):
            degree = getattr(self, name)
            if type(degree) is not int or degree < 1:
                msg = f"{name}={degree!r}; a degree is a whole number, 1 or more"
                raise ParallelConfigError(msg)
        if self.ring_degree > 1:
            msg = (
                f"ring_degree={self.ring_degree}: this version of omni-sp has Ulysses attention "
                "only; legal here: ring_degree=1 with any ulysses_degree"
            )
            raise ParallelConfigError(msg)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks over which the sequence is split."""
        return self.ulysses_degree * self.ring_degree


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split one tensor over the ranks, where a module takes or returns it."""

    split_dim: int
    """Dimension of the sequence."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    split_output: bool = False
    """The tensor is an output of the module, not an input."""
    attends: bool = False
    """Its tokens take part in the model's attention: attention inside the sharded region runs
    over the concatenation of all tensors that say so. Position ids and the like do not."""


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather one output of a module from the ranks."""

    gather_dim: int
    """Dimension of the sequence."""
    expected_dims: int | None = None
    """Number of dimensions that the tensor must have; ``None``: any."""
    like: str | None = None
    """Name of the split tensor whose tokens these are; ``None`` where only one attends."""


InputPlan = Mapping[str | int, SequenceParallelInput]
"""By parameter name, or by index of the output (with ``split_output``)."""
OutputPlan = SequenceParallelOutput | tuple[SequenceParallelOutput | None, ...]
"""For an output that is a tensor, or for each of several outputs."""
SequenceParallelModelPlan = Mapping[str, InputPlan | OutputPlan]
"""By name of the module: ``""`` for the model itself, dotted names for those inside it."""


def validate_sp_plan(plan: SequenceParallelModelPlan) -> None:
    """Check the structure of a plan.

    Raises:
        ParallelConfigError: With everything that is wrong, by module and entry.
    """
    problems = [problem for name, entry in plan.items() for problem in _problems(name, entry)]
    inputs = [entry for entry in plan.values() if isinstance(entry, Mapping)]
    if not any(split.attends for entry in inputs for split in entry.values() if _is_input(split)):
        problems.append("no input has attends=True, so nothing says which tokens attend")
    if problems:
        msg = "the sequence-parallel plan cannot work:\n" + "\n".join(f"  {p}" for p in problems)
        raise ParallelConfigError(msg)


def _problems(name: str, entry: object) -> list[str]:
    where = f"module {name!r}"
    if isinstance(entry, Mapping):
        return [text for key, split in entry.items() for text in _input_problems(where, key, split)]
    outputs = entry if isinstance(entry, tuple) else (entry,)
    if all(output is None or isinstance(output, SequenceParallelOutput) for output in outputs):
        return []
    return [
        f"{where}: {entry!r} is neither a dict of SequenceParallelInput nor a "
        "SequenceParallelOutput, nor a tuple of these and None"
    ]


def _input_problems(where: str, key: object, split: object) -> list[str]:
    if not isinstance(split, SequenceParallelInput):
        return [f"{where}, {key!r}: {split!r} is no SequenceParallelInput"]
    if split.split_output != isinstance(key, int):
        return [
            f"{where}, {key!r}: an output is named by its index with split_output=True, an input "
            "by its parameter with split_output=False"
        ]
    return []


def _is_input(split: object) -> bool:
    return isinstance(split, SequenceParallelInput)


def get_sp_plan_from_model(model: nn.Module) -> SequenceParallelModelPlan | None:
    """The plan of a model: its attribute ``_sp_plan``, else the one known for its class.

    Returns:
        ``None`` if there is neither.

    Raises:
        ParallelConfigError: The model's own plan is malformed.
    """
    from omni_sp.plans import KNOWN_PLANS

    own = getattr(model, "_sp_plan", None)
    if own is not None:
        validate_sp_plan(own)
        return own  # type: ignore[no-any-return]
    classes = (cls.__name__ for cls in type(model).__mro__)
    return next((KNOWN_PLANS[name] for name in classes if name in KNOWN_PLANS), None)
