"""Attention over shards equals torch's own over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from omni_group_coordinator import ParallelConfigError, ParallelError, split_sizes
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    apply_sequence_parallel,
    ulysses_attention,
)


def attend(world_size: int, heads: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    state = ParallelState(ParallelLayout(ulysses=world_size))
    generator = torch.Generator().manual_seed(heads * 100 + length)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator, dtype=dtype) for _ in range(3)
    )
    lengths = split_sizes(length, world_size)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3)
    mine = [t.split(lengths, 2)[state.rank] for t in (query, key, value)]
    found = ulysses_attention(mine[0], mine[1], mine[2], state.sp, lengths, scale=0.3)
    return found, expected.split(lengths, 2)[state.rank]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("heads", "length"), [(4, 12), (3, 13), (1, 5), (5, 3)])
def test_ulysses_equals_the_whole_for_any_heads_and_length(
    ranks: Any, world_size: int, heads: int, length: int
) -> None:
    for found, expected in ranks.run(
        attend, world_size, heads, length, torch.float32, world_size=world_size
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ulysses_keeps_half_precision(ranks: Any) -> None:
    for found, expected in ranks.run(attend, 2, 4, 12, torch.bfloat16):
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found, expected)


class Refined(nn.Module):
    """Attention before, inside and after the region in which the sequence is split."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Identity()
        self.end: nn.Module = nn.Identity()
        self.options: dict[str, Any] = {}

    @staticmethod
    def attend(tokens: Tensor, **options: Any) -> Tensor:
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        out = scaled_dot_product_attention(heads, heads * 0.7, heads + 0.3, **options)
        return out.transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.start(self.attend(tokens))
        tokens = tokens + self.attend(tokens, **self.options)
        return self.attend(self.end(tokens))


PLAN = {
    "start": {0: SequenceParallelInput(1, expected_dims=3, split_output=True, attends=True)},
    "end": SequenceParallelOutput(1, expected_dims=3),
}


def refine(length: int) -> tuple[Tensor, Tensor, list[str]]:
    model = Refined()
    state = ParallelState(ParallelLayout(ulysses=2))
    tokens = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(4))
    expected = model(tokens)
    apply_sequence_parallel(model, SequenceParallelConfig(2), PLAN, state=state)
    found = model(tokens)
    texts = []
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(3, 3)}, {"dropout_p": 0.1}):
        model.options = options
        with pytest.raises(ParallelConfigError) as caught:
            model(tokens)
        texts.append(str(caught.value))
    return found, expected, texts


@pytest.mark.parametrize("length", [6, 7])
def test_attention_outside_the_sharded_region_stays_local(ranks: Any, length: int) -> None:
    for found, expected, texts in ranks.run(refine, length):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert all("not in this version of omni-sp" in text for text in texts)


def never_gathered() -> str:
    model = Refined()
    state = ParallelState(ParallelLayout(ulysses=2))
    apply_sequence_parallel(model, SequenceParallelConfig(2), {"start": PLAN["start"]}, state=state)
    with pytest.raises(ParallelError) as caught:
        model(torch.randn(1, 6, 8))
    return str(caught.value)


def test_a_sequence_that_is_never_gathered_is_an_error(ranks: Any) -> None:
    for text in ranks.run(never_gathered):
        assert "split and not gathered" in text


class LastTokenLost(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, :-1]


def gather_too_few() -> str:
    model = Refined()
    model.end = LastTokenLost()
    state = ParallelState(ParallelLayout(ulysses=2))
    apply_sequence_parallel(model, SequenceParallelConfig(2), PLAN, state=state)
    with pytest.raises(ParallelError) as caught:
        model(torch.randn(1, 6, 8))
    return str(caught.value)


def test_a_gather_of_another_length_than_was_split_is_an_error(ranks: Any) -> None:
    for text in ranks.run(gather_too_few):
        assert "module 'end', output 0: expected 3 tokens in dimension 1" in text
        assert "found shape (1, 2, 8)" in text
