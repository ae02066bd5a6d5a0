"""Plans say what is wrong with them before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    SequenceParallelAttention,
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    apply_sequence_parallel,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from omni_sp.plans import KNOWN_PLANS

TOKENS = SequenceParallelInput(1, attends=True)
JOIN = SequenceParallelOutput(1)


class Block(nn.Module):
    def forward(self, hidden_states: Any, mask: Any = None) -> Any:
        return scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


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


@pytest.mark.parametrize("name", ["kv_exchange", "order"])
def test_an_unknown_choice_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ParallelConfigError, match=f"{name}='fast'; legal: '"):
        SequenceParallelConfig(2, **{name: "fast"})  # type: ignore[arg-type]


def test_a_configuration_knows_its_place_from_setup_or_from_the_current_state() -> None:
    config = SequenceParallelConfig(2, 2)
    assert config.sequence_parallel_size == 4
    assert not config.is_initialized()
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        config.get_rank()
    with pytest.raises(ParallelConfigError, match="legal: world_size=4 and a rank of 0 to 3"):
        config.setup(4, 4, torch.device("cpu"))
    assert not config.is_initialized()
    config.setup(3, 4, torch.device("cpu"))
    assert config.is_initialized()
    assert (config.get_rank(), config.get_world_size()) == (3, 4)
    assert (config.get_ulysses_rank(), config.get_ulysses_world_size()) == (1, 2)
    assert (config.get_ring_rank(), config.get_ring_world_size()) == (1, 2)


def places() -> tuple[int, int, int, int]:
    config = SequenceParallelConfig(2, 2)
    with ParallelState(ParallelLayout(ulysses=2, ring=2)).use():
        return (
            config.get_rank(),
            config.get_world_size(),
            config.get_ulysses_rank(),
            config.get_ring_rank(),
        )


def test_without_setup_a_configuration_reads_the_current_state(ranks: Any) -> None:
    assert ranks.run(places, world_size=4) == [
        (0, 4, 0, 0),
        (1, 4, 1, 0),
        (2, 4, 0, 1),
        (3, 4, 1, 1),
    ]


def test_the_known_plans_are_well_formed() -> None:
    for plan in KNOWN_PLANS.values():
        validate_sp_plan(plan)


def test_every_mistake_of_a_plan_is_listed() -> None:
    plan: Any = {
        "": {"x": SequenceParallelInput(1, split_output=True), 0: SequenceParallelInput(1)},
        "a": {"y": JOIN},
        "b": "gather",
        "c": (None, JOIN),
        7: JOIN,
        "d": {"z": (None,), -1: replace(TOKENS, split_output=True)},
        "e": {"z": SequenceParallelInput(3, expected_dims=3)},
        "f": {"z": SequenceParallelPartialInput(1, -4)},
        "g": {"z": SequenceParallelInput(1, like="x", attends=True)},
        "h": {"z": SequenceParallelInput(1, unit="width", auto_pad=True)},
        "i": SequenceParallelAttention(("*", "x", "*")),
        "j": SequenceParallelAttention(kind="linear"),
        "k": SequenceParallelAttention(("x",), masks={"y": "mask"}),
    }
    with pytest.raises(ParallelConfigError) as caught:
        validate_sp_plan(plan)
    text = str(caught.value)
    for part in (
        "module '', 'x'",
        "module '', 0",
        "'y'",
        "module 'b': 'gather'",
        "module 7: a module is named by text",
        "module 'd', 'z'",
        "module 'd', -1: outputs are counted from 0",
        "module 'e', 'z': split_dim=3 of 3 dimensions",
        "module 'f', 'z': text_len_source=-4",
        "module 'g', 'z': like='x' splits as that stream is split",
        "module 'h', 'z': auto_pad pads single tokens",
        "module 'i': '*' stands for the rest",
        "module 'j': linear attention attends over exactly one named stream",
        "module 'k': masks {'y': 'mask'}",
    ):
        assert part in text
    assert "'c'" not in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"": {"x": SequenceParallelInput(1)}, "a": JOIN}, "no input has attends=True"),
        ({"": {"x": TOKENS}}, "nothing is gathered"),
        ({"": {"x": TOKENS}, "a": SequenceParallelOutput(1, like="y")}, "refers to 'y'.*splits: x"),
        (
            {"": {"x": TOKENS}, "a": JOIN, "b": SequenceParallelAttention(("x", "z"))},
            "module 'b': refers to 'z'",
        ),
        ([], "a dict by module name; got a list"),
    ],
)
def test_a_plan_whose_parts_do_not_go_together_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        validate_sp_plan(plan)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"": {"hidden": TOKENS}}, "'hidden' of model Model.*takes: hidden_states"),
        ({"": {"hidden_states": TOKENS}, "tail": JOIN}, "'tail', which Model.*blocks, head"),
        ({"blocks.2": {"hidden_states": TOKENS}}, "'blocks.2'.*blocks has: 0, 1"),
        ({"blocks.-3": {"hidden_states": TOKENS}}, "'blocks.-3'.*blocks has: 0, 1"),
        ({"head.*": JOIN}, "'head' is a Linear; '[*]' stands for the modules of a list"),
        ({"blocks.0": {"image": TOKENS}}, "'image' of module 'blocks.0', a Block"),
        ({"blocks.*": {"image": TOKENS}}, "'image' of module 'blocks.0', a Block"),
        ({"": {"hidden_states": replace(TOKENS, unit="width")}}, "'width' of model Model"),
        ({"blocks": SequenceParallelAttention()}, "attention of module 'blocks', a ModuleList"),
        (
            {"blocks.0": {"mask": TOKENS}, "blocks.-2": {"mask": SequenceParallelInput(0)}},
            "two entries for 'mask' of module 'blocks.0'",
        ),
    ],
)
def test_a_plan_that_names_what_the_model_lacks_is_refused_before_any_call(
    alone: ParallelState, plan: Any, message: str
) -> None:
    model = Model()
    plan = {"": {"hidden_states": TOKENS}, "head": JOIN} | plan
    with pytest.raises(ParallelConfigError, match=message):
        apply_sequence_parallel(model, SequenceParallelConfig(), plan, state=alone)
    with pytest.raises(ParallelConfigError, match=message):
        validate_sp_plan(plan, model)
    assert not any(module._forward_hooks for module in model.modules())


def test_degrees_that_differ_from_the_state_are_refused(alone: ParallelState) -> None:
    plan = {"": {"hidden_states": TOKENS}, "head": JOIN}
    with pytest.raises(ParallelConfigError, match=r"ulysses_degree=2.*made with ulysses=1"):
        apply_sequence_parallel(Model(), SequenceParallelConfig(2), plan, state=alone)


def test_a_model_without_a_plan_is_refused_and_its_own_plan_is_taken(alone: ParallelState) -> None:
    model = Model()
    assert get_sp_plan_from_model(model) is None
    with pytest.raises(ParallelConfigError, match="no sequence-parallel plan is known for Model"):
        apply_sequence_parallel(model, SequenceParallelConfig(), state=alone)
    plan = {"": {"hidden_states": TOKENS}, "head": JOIN}
    model._sp_plan = plan  # type: ignore[assignment]
    assert get_sp_plan_from_model(model) == plan
    apply_sequence_parallel(model, SequenceParallelConfig(), state=alone).remove()
    model._sp_plan = {"": {"hidden_states": TOKENS}}  # type: ignore[assignment]
    with pytest.raises(ParallelConfigError, match="nothing is gathered"):
        get_sp_plan_from_model(model)


@pytest.mark.parametrize("mark", ["?", ""])
def test_a_question_mark_is_for_what_some_models_of_a_class_lack(mark: str) -> None:
    with_mask: Any = {"": {"hidden_states": TOKENS}, "head": JOIN}
    with_mask["blocks.*"] = {f"mask{mark}": SequenceParallelInput(1, like="hidden_states")}
    validate_sp_plan(with_mask, Model())
    for more, message in (
        ({"blocks.*": {f"ids{mark}": SequenceParallelInput(1)}}, "the parameter 'ids'"),
        ({f"blocks.*.attn{mark}": SequenceParallelAttention()}, "'blocks.*.attn', which Model"),
    ):
        if mark:
            validate_sp_plan(with_mask | more, Model())
            continue
        with pytest.raises(ParallelConfigError, match=re.escape(message)):
            validate_sp_plan(with_mask | more, Model())


def test_without_a_state_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        apply_sequence_parallel(Model(), SequenceParallelConfig(), {"": {"hidden_states": TOKENS}})


# -- diffusers' own plans ----------------------------------------------------------------------


@dataclass
class Split:
    """As diffusers' ContextParallelInput."""

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass
class Gather:
    """As diffusers' ContextParallelOutput."""

    gather_dim: int
    expected_dims: int | None = None


def test_the_plan_that_diffusers_declares_is_converted() -> None:
    model = Model()
    model._cp_plan = {  # type: ignore[assignment]
        "": {
            "hidden_states": Split(1, 3),
            "encoder_hidden_states": Split(1, 3),
            "encoder_hidden_states_mask": Split(1, 2),
        },
        "rope": {0: Split(0, 2, True), 1: Split(0, 2, True)},
        "blocks.0": {"freqs": [Split(0), None]},
        "head": Gather(1, 3),
        "other": [Gather(1), None],
    }
    assert get_sp_plan_from_model(model) == {
        "": {
            "hidden_states": SequenceParallelInput(1, 3, attends=True),
            "encoder_hidden_states": SequenceParallelInput(1, 3, attends=True),
            "encoder_hidden_states_mask": SequenceParallelInput(1, 2),
        },
        "rope": {
            0: SequenceParallelInput(0, 2, split_output=True),
            1: SequenceParallelInput(0, 2, split_output=True),
        },
        "blocks.0": {"freqs": (SequenceParallelInput(0), None)},
        "head": SequenceParallelOutput(1, 3, like="hidden_states"),
        "other": (SequenceParallelOutput(1, like="hidden_states"), None),
    }
    model._cp_plan = {"": {"hidden_states": "split"}}  # type: ignore[assignment]
    with pytest.raises(ParallelConfigError, match="'split' in the model's _cp_plan"):
        get_sp_plan_from_model(model)


def test_blocks_that_a_declared_plan_numbers_beyond_the_models_are_left_out() -> None:
    model = Model()
    first: dict[str, Any] = {"blocks.0": {"hidden_states": Split(1, 3)}}
    model._cp_plan = first | {f"blocks.{i}": Gather(1, 3) for i in range(1, 40)}  # type: ignore[assignment]
    assert get_sp_plan_from_model(model) == {
        "blocks.0": {"hidden_states": SequenceParallelInput(1, 3, attends=True)},
        "blocks.1": SequenceParallelOutput(1, 3, like="hidden_states"),
    }
    own = {"blocks.0": {"hidden_states": TOKENS}, "blocks.1": JOIN, "blocks.2": JOIN}
    with pytest.raises(ParallelConfigError, match=r"'blocks\.2'.*blocks has: 0, 1"):
        validate_sp_plan(own, model)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        # None of a series is there: another model, not a shallower one.
        ({"blocks.2.attn": Gather(1), "blocks.3.attn": Gather(1)}, "'blocks.2.attn', which"),
        ({"block.7": Gather(1)}, "'block.7', which Model does not have"),
        ({"blocks.1.attn": Gather(1)}, "'blocks.1.attn', which"),
        ({"head.3": Gather(1)}, "'head.3', which"),
    ],
)
def test_what_else_a_declared_plan_names_must_be_there(
    alone: ParallelState, more: Any, message: str
) -> None:
    model = Model()
    plan = {"blocks.0": {"hidden_states": Split(1, 3)}, "blocks.1": Gather(1, 3), **more}
    model._cp_plan = plan  # type: ignore[assignment]
    with pytest.raises(ParallelConfigError, match=message):
        apply_sequence_parallel(model, SequenceParallelConfig(), state=alone)
