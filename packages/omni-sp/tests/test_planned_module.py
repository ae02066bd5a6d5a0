"""Parameters of planned modules, however their `forward` takes them, and masks of a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_transformers import TOKENS, WIDTH, Attention, apply, close, seeded

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_sp import (
    SequenceParallelAttention,
    SequenceParallelInput,
    SequenceParallelOutput,
    validate_sp_plan,
)
from omni_sp.plan_entries import SequenceParallelRefusal

LIKE = SequenceParallelInput(1, like="tokens")


class Inner(nn.Module):
    """With more arguments by position than names, and a parameter behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor, *more: Any, positions: Tensor) -> Tensor:
        return self.attn(tokens + positions) * (1 + sum(more))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, tokens: Tensor, positions: Tensor, *more: Any) -> Tensor:
        return self.inner(tokens, *more, positions=positions)


def by_keyword() -> None:
    model = Model()
    plan = {
        "inner": {"tokens": TOKENS, "positions": LIKE},
        "inner.attn": SequenceParallelAttention(("tokens",)),
    }
    plan_with_end: Any = plan | {"": SequenceParallelOutput(1)}
    tokens, positions = seeded(1, 7, WIDTH), seeded(1, 7, WIDTH, seed=1)
    for more in ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)):
        expected = model(tokens, positions, *more)
        with apply(model, plan_with_end):
            close(model(tokens, positions, *more), expected)


def test_a_parameter_behind_any_number_of_arguments_is_passed_by_keyword(ranks: Any) -> None:
    ranks.run(by_keyword)


class Masked(nn.Module):
    """Makes the mask of its attention from one of the keys, as the blocks of some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.end = Attention(), nn.Identity()

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        return self.end(self.attn(tokens, attn_mask=keys[:, None, None, :]))


MASKED: dict[str, Any] = {
    "": {"tokens": TOKENS, "keys": LIKE},
    "attn": SequenceParallelAttention(("tokens",), masks={"tokens": "keys"}),
    "end": SequenceParallelOutput(1),
}


def masks_of_the_plan() -> str:
    model, tokens = Masked(), seeded(2, 7, WIDTH)
    attends = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)
    expected = model(tokens, attends)
    bias = torch.zeros(2, 7).masked_fill(~attends, -1e4)
    with apply(model, MASKED):
        close(model(tokens, attends), expected)
        # As booleans these would attend to what they forbid, and to nothing else.
        with pytest.raises(ParallelError) as caught:
            model(tokens, bias)
    return str(caught.value)


def test_an_additive_mask_is_not_taken_for_a_boolean_one(ranks: Any) -> None:
    for text in ranks.run(masks_of_the_plan):
        assert "attention of module 'attn': 'keys' is a key mask of dtype torch.float32" in text
        assert "legal: bool or integers, where true attends" in text


def refused() -> str:
    model, tokens = Masked(), seeded(1, 7, WIDTH)
    plan = MASKED | {"": {"tokens": TOKENS, "keys": SequenceParallelRefusal("not split; why not")}}
    plan |= {"attn": SequenceParallelAttention(("tokens",))}
    validate_sp_plan(plan, model)
    with apply(model, plan), pytest.raises(ParallelConfigError) as caught:
        model(tokens, torch.ones(1, 7, dtype=torch.bool))
    return str(caught.value)


def test_a_parameter_that_a_plan_refuses_says_why(ranks: Any) -> None:
    for text in ranks.run(refused):
        assert text == "model Masked, parameter 'keys': not split; why not"


class Residuals(nn.Module):
    """Adds to its tokens what it is given for some blocks, by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.end = Attention(), nn.Identity()

    def forward(self, tokens: Tensor, added: dict[int, Tensor | None]) -> Tensor:
        for block in range(3):
            tokens = self.attn(tokens)
            more = added.get(block)
            tokens = tokens if more is None else tokens + more
        return self.end(tokens)


def dict_of_tensors() -> None:
    model, tokens = Residuals(), seeded(1, 7, WIDTH)
    added = {0: seeded(1, 7, WIDTH, seed=1), 1: None, 2: seeded(1, 7, WIDTH, seed=2)}
    expected = model(tokens, added)
    plan = {"": {"tokens": TOKENS, "added": LIKE}, "end": SequenceParallelOutput(1)}
    with apply(model, plan):
        close(model(tokens, added), expected)


def test_every_tensor_of_a_dict_is_split(ranks: Any) -> None:
    ranks.run(dict_of_tensors)
