"""Plans say what is wrong with them before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    apply_sequence_parallel,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from omni_sp.plans import KNOWN_PLANS

TOKENS = SequenceParallelInput(1, attends=True)
JOIN = SequenceParallelOutput(1)


class Block(nn.Module):
    def forward(self, hidden_states: Any, mask: Any = None) -> Any:
        return hidden_states


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(2, 2)

    def forward(self, hidden_states: Any) -> Any:
        return self.head(hidden_states)


@pytest.fixture
def alone() -> ParallelState:
    return ParallelState(ParallelLayout())


@pytest.mark.parametrize("degree", [0, -2, 2.5, "2", True])
def test_a_degree_that_is_no_whole_number_above_zero_is_refused(degree: Any) -> None:
    with pytest.raises(
        ParallelConfigError, match=f"ulysses_degree={degree!r}; a degree is a whole"
    ):
        SequenceParallelConfig(degree)


def test_ring_attention_is_refused_until_it_exists() -> None:
    with pytest.raises(ParallelConfigError, match="legal here: ring_degree=1"):
        SequenceParallelConfig(2, 2)


def test_the_known_plans_are_well_formed() -> None:
    for plan in KNOWN_PLANS.values():
        validate_sp_plan(plan)


def test_every_mistake_of_a_plan_is_listed() -> None:
    plan: Any = {
        "": {"x": SequenceParallelInput(1, split_output=True), 0: SequenceParallelInput(1)},
        "a": {"y": JOIN},
        "b": "gather",
        "c": (None, JOIN),
    }
    with pytest.raises(ParallelConfigError) as caught:
        validate_sp_plan(plan)
    text = str(caught.value)
    for part in ("module '', 'x'", "module '', 0", "'y'", "module 'b': 'gather'", "attends=True"):
        assert part in text
    assert "'c'" not in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"": {"hidden": TOKENS}}, "'hidden' of model Model.*takes: hidden_states"),
        ({"": {"hidden_states": TOKENS}, "tail": JOIN}, "'tail', which Model.*blocks, head"),
        ({"blocks.2": {"hidden_states": TOKENS}}, "'blocks.2'.*ModuleList has: 0, 1"),
        ({"blocks.0": {"image": TOKENS}}, "'image' of module 'blocks.0', a Block"),
    ],
)
def test_a_plan_that_names_what_the_model_lacks_is_refused_before_any_call(
    alone: ParallelState, plan: Any, message: str
) -> None:
    model = Model()
    with pytest.raises(ParallelConfigError, match=message):
        apply_sequence_parallel(model, SequenceParallelConfig(), plan, state=alone)
    assert not any(module._forward_hooks for module in model.modules())


def test_degrees_that_differ_from_the_state_are_refused(alone: ParallelState) -> None:
    plan = {"": {"hidden_states": TOKENS}}
    with pytest.raises(ParallelConfigError, match=r"ulysses_degree=2.*made with ulysses=1"):
        apply_sequence_parallel(Model(), SequenceParallelConfig(2), plan, state=alone)


def test_a_model_without_a_plan_is_refused_and_its_own_plan_is_taken(alone: ParallelState) -> None:
    model = Model()
    assert get_sp_plan_from_model(model) is None
    with pytest.raises(ParallelConfigError, match="no sequence-parallel plan is known for Model"):
        apply_sequence_parallel(model, SequenceParallelConfig(), state=alone)
    model._sp_plan = {"": {"hidden_states": TOKENS}}  # type: ignore[assignment]
    assert get_sp_plan_from_model(model) == {"": {"hidden_states": TOKENS}}


def test_without_a_state_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        apply_sequence_parallel(Model(), SequenceParallelConfig(), {"": {"hidden_states": TOKENS}})
