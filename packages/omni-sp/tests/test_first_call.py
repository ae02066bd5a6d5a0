"""In the first call of a model, what one rank refuses is an error on all, at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_transformers import TOKENS, WIDTH, Attention, Crossing, Toy, apply, close, seeded

from omni_group_coordinator import ParallelError, record_traffic
from omni_sp import LOCAL_ATTENTION, SequenceParallelAttention, SequenceParallelOutput

CROSSING: dict[str, Any] = {"": {"tokens": TOKENS}, "inner": SequenceParallelOutput(1)}


def refusal(model: nn.Module, plan: Any, *inputs: Tensor) -> str:
    with apply(model, plan), pytest.raises(ParallelError) as caught:
        model(*inputs)
    return str(caught.value)


def unnamed_cross_attention(ring: bool) -> str:
    """To a text that is as long as the part of the second rank: 7 tokens are 4 and 3."""
    model, inputs = Crossing(), (seeded(1, 7, WIDTH), seeded(1, 3, WIDTH, seed=1))
    degrees = (1, 2) if ring else (2, 1)
    with apply(model, CROSSING, *degrees), pytest.raises(ParallelError) as caught:
        model(*inputs)
    expected = model(*inputs)
    with apply(model, CROSSING | {"inner.attn2": LOCAL_ATTENTION}, *degrees):
        close(model(*inputs), expected)  # the ranks are still in step
    return str(caught.value)


@pytest.mark.parametrize("ring", [False, True])
def test_a_cross_attention_that_fits_one_rank_alone_is_an_error_on_all(
    ranks: Any, ring: bool
) -> None:
    first, second = ranks.run(unnamed_cross_attention, ring, timeout=20)
    assert "attention of module 'inner.attn2' has 3 tokens on this rank; expected 4" in first
    assert "attention of module 'inner.attn2': another rank refused this call" in second


class Cut(nn.Module):
    """Gives back four tokens at most."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(tokens)[:, :4]


class Shortened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Cut()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


def wrong_gather() -> str:
    plan = {"": {"tokens": TOKENS}, "inner": SequenceParallelOutput(1)}
    return refusal(Shortened(), plan, seeded(1, 9, WIDTH))  # 5 and 4


def test_an_output_that_fits_one_rank_alone_is_an_error_on_all(ranks: Any) -> None:
    first, second = ranks.run(wrong_gather, timeout=20)
    assert "module 'inner', output 0: expected 5 tokens in dimension 1" in first
    assert "module 'inner', output 0: another rank refused this call" in second


class Linear(nn.Module):
    """Linear attention, over keys that are not always the tokens."""

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(tokens, torch.matmul(keys.transpose(1, 2), keys))


class AroundLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.linear, self.end = Attention(), Linear(), nn.Identity()

    def forward(self, tokens: Tensor, keys: Tensor) -> Tensor:
        return self.end(self.linear(self.attn(tokens), keys))


def wrong_sum() -> str:
    plan = {
        "": {"tokens": TOKENS},
        "linear": SequenceParallelAttention(("tokens",), kind="linear"),
        "end": SequenceParallelOutput(1),
    }
    return refusal(AroundLinear(), plan, seeded(1, 7, WIDTH), seeded(1, 3, WIDTH, seed=1))


def test_linear_attention_that_fits_one_rank_alone_is_an_error_on_all(ranks: Any) -> None:
    first, second = ranks.run(wrong_sum, timeout=20)
    assert "module 'linear': expected its first product to sum over 4 tokens" in first
    assert "module 'linear': another rank refused this call" in second


def agreements() -> list[int]:
    """All-reduces of each call, of which only agreement makes any."""
    model, tokens, found = Toy(), seeded(1, 9, WIDTH), []
    with apply(model):
        for _ in range(3):
            with record_traffic() as traffic:
                model(tokens)
            found.append(traffic.calls["all_reduce"])
    with apply(model), record_traffic() as traffic:
        torch.compile(model, backend="eager", fullgraph=True)(tokens)
    return [*found, traffic.calls["all_reduce"]]


def test_the_ranks_agree_in_the_first_call_alone_and_never_in_a_trace(ranks: Any) -> None:
    for first, second, third, compiled in ranks.run(agreements):
        assert first == 4  # two attentions, a gather, and the end
        assert (second, third, compiled) == (0, 0, 0)


def a_failed_first_call() -> None:
    """Is not the one after which calls are taken on trust."""
    model, text = Crossing(), seeded(1, 3, WIDTH, seed=1)
    with apply(model, CROSSING):
        for _ in range(2):
            with pytest.raises(ParallelError):
                model(seeded(1, 7, WIDTH), text)
    cut = Shortened()
    with apply(cut, {"inner": {"tokens": TOKENS}, "": SequenceParallelOutput(1)}):
        for _ in range(2):  # what fails is the last thing that a call does
            with pytest.raises(ParallelError):
                cut(seeded(1, 9, WIDTH))


def test_after_a_first_call_that_failed_the_next_is_watched_too(ranks: Any) -> None:
    ranks.run(a_failed_first_call, timeout=20)


class Pairs(nn.Module):
    """A block that takes tokens two by two, which a part of odd length does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        tokens = tokens.reshape(batch, length // 2, 2 * width).reshape(batch, length, width)
        return self.attention(tokens)


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.out = Pairs(), nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.block(tokens))


PAIRS: dict[str, Any] = {"": {"tokens": TOKENS}, "out": SequenceParallelOutput(1)}


def of_pairs() -> tuple[str, str]:
    """Ten tokens on three ranks are four, three and three."""
    model, tokens = OfPairs(), seeded(1, 10, WIDTH)
    with apply(model, PAIRS, 3), pytest.raises(RuntimeError) as caught:
        model(tokens)
    with apply(model, PAIRS, 3):  # the ranks are still in step
        close(model(seeded(1, 12, WIDTH)), OfPairs()(seeded(1, 12, WIDTH)))
    return type(caught.value).__name__, str(caught.value)


def test_an_error_of_the_models_own_code_on_some_ranks_ends_the_call_on_all(ranks: Any) -> None:
    (name, first), *others = ranks.run(of_pairs, world_size=3, timeout=30)
    assert name == "ParallelError"
    assert "another rank refused this call, or failed before it" in first
    for kind, text in others:
        assert kind == "RuntimeError"
        assert "invalid for input of size" in text
