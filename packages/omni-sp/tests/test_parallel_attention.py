"""Attention over a split sequence equals torch's over the whole, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Call, largest_error, local, tensors, whole_attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_group_coordinator import ParallelConfigError, record_traffic
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    Degrees,
    Segment,
    SequenceParallelConfig,
    SequenceShards,
    TorchKernel,
    attention_volume,
    sequence_parallel_attention,
)

TOLERANCE = 2e-5  # of values up to 8: 2.5e-6 relative
DEGREES = [(2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (1, 4)]

drawn = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def worst(ranks: Any, call: Call, ulysses: int, ring: int) -> float:
    errors = ranks.run(largest_error, call, ulysses, ring, world_size=ulysses * ring)
    return float(max(errors))


@st.composite
def segments(draw: st.DrawFn, order: str) -> tuple[Segment, ...]:
    count = draw(st.integers(1, 3))
    whole = draw(st.integers(0, 2 * count - 1))  # this one is replicated, if it is one of them
    padded = order == "contiguous" and draw(st.booleans())
    lengths = [draw(st.integers(0 if count > 1 else 1, 19)) for _ in range(count)]
    if not sum(lengths):
        lengths[0] = 5
    return tuple(
        Segment(length, replicated=i == whole, padded=padded and i != whole)
        for i, length in enumerate(lengths)
    )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    order = draw(st.sampled_from(["contiguous", "zigzag"]))
    streams = draw(segments(order))
    mask = draw(st.sampled_from(["none", "keys", "pairs", "bias", "causal"]))
    others = None
    if mask != "causal" and draw(st.booleans()):
        others = draw(segments(order))
    return Call(
        streams,
        others,
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 3)),
        width=8,
        value_width=draw(st.sampled_from([8, 8, 4])),
        mask=mask,
        exchange=draw(st.sampled_from(["ring", "allgather", "auto"])),
        order=order,
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_any_call_equals_the_whole(ranks: Any, ulysses: int, ring: int) -> None:
    @drawn
    @given(calls())
    def check(call: Call) -> None:
        assert worst(ranks, call, ulysses, ring) < TOLERANCE

    check()


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
@pytest.mark.parametrize("exchange", ["ring", "allgather"])
@pytest.mark.parametrize(
    ("mask", "part"),
    [("keys", "keys"), ("pairs", "keys"), ("pairs", "queries"), ("bias", "queries")],
)
def test_a_mask_of_this_ranks_part_travels_with_the_keys(
    ranks: Any, ulysses: int, ring: int, exchange: Any, mask: Any, part: Any
) -> None:
    for streams in ((Segment(7), Segment(11)), (Segment(5, replicated=True), Segment(9))):
        call = Call(streams, batch=2, mask=mask, local_mask=part, exchange=exchange)
        assert worst(ranks, call, ulysses, ring) < TOLERANCE


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
def test_samples_of_a_batch_keep_their_own_masks(ranks: Any, ulysses: int, ring: int) -> None:
    call = Call((Segment(9),), batch=2, mask="keys", seed=3)
    mask = tensors(call)[3]
    assert mask is not None
    assert not torch.equal(mask[0], mask[1])
    assert worst(ranks, call, ulysses, ring) < TOLERANCE


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("exchange", ["ring", "allgather"])
@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_a_replicated_text_counts_once(
    ranks: Any, world_size: int, exchange: Any, mode: str
) -> None:
    degrees = (world_size, 1) if mode == "ulysses" else (1, world_size)
    for streams in (
        (Segment(5, replicated=True), Segment(13)),
        (Segment(13), Segment(5, replicated=True)),
        (Segment(6), Segment(5, replicated=True), Segment(7)),
    ):
        call = Call(streams, exchange=exchange)
        assert worst(ranks, call, *degrees) < TOLERANCE


@pytest.mark.parametrize("exchange", ["ring", "allgather"])
@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_any_layout_in_memory_will_do(ranks: Any, ulysses: int, ring: int, exchange: Any) -> None:
    call = Call((Segment(9),), kv_heads=5, exchange=exchange, strided=True)
    assert worst(ranks, call, ulysses, ring) < TOLERANCE


def ring_error(world_size: int, merge_in_float32: bool) -> float:
    call = Call((Segment(96),), kv_heads=4, dtype=torch.bfloat16, merge_in_float32=merge_in_float32)
    return largest_error(call, 1, world_size)


def test_the_error_of_ring_in_bfloat16_does_not_grow_with_the_ranks(ranks: Any) -> None:
    two, eight = (max(ranks.run(ring_error, n, True, world_size=n)) for n in (2, 8))
    assert eight < 1.5 * two


def test_merging_in_the_models_dtype_is_what_one_asks_for(ranks: Any) -> None:
    exact, rough = (max(ranks.run(ring_error, 4, fp32, world_size=4)) for fp32 in (True, False))
    assert rough > 1.2 * exact


def bits(exchange: str) -> bool:
    ulysses, ring = (2, 1) if exchange == "ulysses" else (1, 2)
    call = Call((Segment(24),), kv_heads=4)
    query, key, value, _ = tensors(call)
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    shards = SequenceShards.of(24, 2)
    mine = [local(t, shards, state.rank, 1) for t in (query, key, value)]
    config = SequenceParallelConfig(ulysses, ring, kv_exchange="allgather")
    found = sequence_parallel_attention(
        mine[0], mine[1], mine[2], config, shards=shards, scale=0.4, state=state
    )
    return torch.equal(found, local(whole_attention(call), shards, state.rank, 1))


@pytest.mark.parametrize("mode", ["ulysses", "allgather"])
def test_ulysses_and_allgather_are_equal_to_the_bit(ranks: Any, mode: str) -> None:
    assert ranks.run(bits, mode) == [True, True]


# -- what is sent ------------------------------------------------------------------------------


def traffic_of(ulysses: int, ring: int, exchange: Any, kv_heads: int) -> tuple[int, int]:
    heads, width, length = 8, 16, 48
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    shards = SequenceShards.of(length, ulysses * ring)
    mine = length // (ulysses * ring)
    query = torch.randn(1, mine, heads, width)
    key, value = torch.randn(2, 1, mine, kv_heads, width).unbind(0)
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)
    with record_traffic() as traffic:
        sequence_parallel_attention(query, key, value, config, shards=shards, state=state)
    whole_query = length * heads * width * 4
    return traffic.total_bytes * 1000 // whole_query, traffic.total_calls


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize("exchange", ["ring", "allgather"])
@pytest.mark.parametrize(("ulysses", "ring"), [(u, r) for u, r in DEGREES if u != 3])
def test_sends_exactly_what_the_formula_says(
    ranks: Any, ulysses: int, ring: int, exchange: str, kv_heads: int
) -> None:
    volume = attention_volume(Degrees(ulysses, ring), kv_heads / 8)
    steps = 0 if ring == 1 else 1 if exchange == "allgather" else ring - 1
    collectives = (2 if ulysses > 1 else 0) + steps
    for sent, calls_made in ranks.run(
        traffic_of, ulysses, ring, exchange, kv_heads, world_size=ulysses * ring
    ):
        assert (sent, calls_made) == (int(volume * 1000), collectives)


def auto_choice(kv_heads: int) -> set[str]:
    state = ParallelState(ParallelLayout(ulysses=4))
    shards = SequenceShards.of(16, 4)
    query, key = torch.randn(1, 4, 8, 8), torch.randn(1, 4, kv_heads, 8)
    config = SequenceParallelConfig(4, kv_exchange="auto")
    with record_traffic() as traffic:
        sequence_parallel_attention(query, key, key, config, shards=shards, state=state)
    return set(traffic.calls)


def test_auto_takes_what_sends_least(ranks: Any) -> None:
    assert ranks.run(auto_choice, 8, world_size=4) == [{"all_to_all"}] * 4
    # One key/value head for eight query heads: gathering it sends less than exchanging queries.
    assert ranks.run(auto_choice, 1, world_size=4) == [{"all_gather"}] * 4


# -- a kernel of one's own ---------------------------------------------------------------------


class CountingKernel(TorchKernel):
    """torch's kernel, and how often it ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def attend(self, *args: Any, **options: Any) -> Tensor:
        self.calls.append("attend")
        return super().attend(*args, **options)

    def attend_with_lse(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("attend_with_lse")
        return super().attend_with_lse(*args, **options)


def use_a_kernel(exchange: Any) -> list[str]:
    kernel = CountingKernel()
    ulysses, ring = (2, 1) if exchange == "ulysses" else (1, 2)
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    kind = "ring" if exchange == "ulysses" else exchange
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=kind, kernel=kernel)
    query = torch.randn(1, 4, 2, 8)
    shards = SequenceShards.of(8, 2)
    sequence_parallel_attention(query, query, query, config, shards=shards, state=state)
    return kernel.calls


def test_a_kernel_of_ones_own_computes(ranks: Any) -> None:
    assert ranks.run(use_a_kernel, "ulysses") == [["attend"]] * 2
    assert ranks.run(use_a_kernel, "allgather") == [["attend"]] * 2
    assert ranks.run(use_a_kernel, "ring") == [["attend_with_lse"] * 2] * 2


def test_what_is_no_kernel_is_refused() -> None:
    with pytest.raises(ParallelConfigError, match="lacks attend or attend_with_lse"):
        SequenceParallelConfig(kernel=torch.nn.Identity())  # type: ignore[arg-type]


# -- bad input ---------------------------------------------------------------------------------


def refusals() -> list[str]:
    state = ParallelState(ParallelLayout(ulysses=2))
    config, shards = SequenceParallelConfig(2), SequenceShards.of(8, 2)
    good = torch.randn(1, 4, 6, 8)
    bad: list[tuple[dict[str, Any], SequenceParallelConfig]] = [
        ({"query": good[0]}, config),
        ({"query": good[:, :3]}, config),
        ({"key": good[:, :, :4], "value": good[:, :, :4]}, config),
        ({"key": good.double()}, config),
        ({"value": good.to("meta")}, config),
        ({"attn_mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)}, config),
        ({"attn_mask": torch.ones(1, 1, 1, 8, dtype=torch.int64)}, config),
        ({"attn_mask": torch.ones(4, 4, dtype=torch.bool)}, config),
        ({"attn_mask": torch.ones(8, 8, dtype=torch.bool), "is_causal": True}, config),
        ({"shards": SequenceShards.of(12, 3)}, config),
        ({}, SequenceParallelConfig(1, 2)),
    ]
    texts = []
    for changed, asked in bad:
        call: dict[str, Any] = {"query": good, "key": good, "value": good, "shards": shards}
        call |= changed
        query, key, value = call.pop("query"), call.pop("key"), call.pop("value")
        with pytest.raises(ParallelConfigError) as caught:
            sequence_parallel_attention(query, key, value, asked, state=state, **call)
        texts.append(str(caught.value))
    return texts


def test_bad_input_is_refused_before_anything_is_sent(ranks: Any) -> None:
    expected = [
        "query, key and value are (batch, sequence, heads, head_dim); got [(4, 6, 8), ",
        "the query has 3 tokens (shape (1, 3, 6, 8)); group rank ",
        "6 query heads cannot be grouped over 4 key/value heads; legal here: 1, 2, 3, 6",
        "query, key and value have the dtypes float32, float64, float32",
        "query, key and value have the devices cpu, cpu, meta",
        "legal sizes here: batch 1, heads 1 or 6, queries 1 or 4 or 8, keys 4 or 8",
        "an attention mask of dtype int64; legal: bool (true attends) or a floating-point bias",
        "has the queries and the keys of this rank alone, so it says nothing of the other",
        "causal attention takes no mask",
        "shards over 3 ranks, but group 'sp' has 2",
        "ulysses_degree=1, ring_degree=2, but the parallel state was made with ulysses=2, ring=1",
    ]
    for texts in ranks.run(refusals):
        for text, part in zip(texts, expected, strict=True):
            assert part in text
