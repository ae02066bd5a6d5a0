"""A hooked model equals itself; what does not fit is an error and leaves nothing behind."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_transformers import (
    PLAN,
    TOKENS,
    WIDTH,
    Attention,
    Between,
    Crossing,
    Output,
    Processed,
    Processor,
    Toy,
    apply,
    attend,
    close,
    seeded,
)

from omni_group_coordinator import ParallelConfigError, ParallelError, record_traffic
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    LOCAL_ATTENTION,
    SequenceParallelAttention,
    SequenceParallelConcatInput,
    SequenceParallelConfig,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    apply_sequence_parallel,
    remove_sequence_parallel,
)

# -- the region --------------------------------------------------------------------------------


def alternate(ulysses: int, ring: int, exchange: Any) -> None:
    model = Toy()
    calls = [(9, 1), (12, 2), (5, 1), (16, 3), (9, 1), (1, 1)]
    inputs = [
        (seeded(batch, length, WIDTH, seed=i), seeded(1, length, WIDTH, seed=i + 50))
        for i, (length, batch) in enumerate(calls)
    ]
    expected = [model(*pair) for pair in inputs]
    with apply(model, None, ulysses, ring, kv_exchange=exchange):
        for pair, wanted in zip(inputs, expected, strict=True):
            close(model(*pair), wanted)
    assert torch.equal(model(*inputs[0]), expected[0])


@pytest.mark.parametrize("exchange", ["ring", "allgather", "auto"])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2)])
def test_calls_may_alternate_lengths_and_batches(
    ranks: Any, ulysses: int, ring: int, exchange: str
) -> None:
    ranks.run(alternate, ulysses, ring, exchange, world_size=ulysses * ring)


def count_outside() -> list[int]:
    """Attention calls that crossed ranks: the two blocks', not the two refiners'."""
    model = Toy()
    with apply(model), record_traffic() as traffic:
        model(seeded(1, 8, WIDTH))
    return [traffic.calls["all_to_all"]]


def test_attention_outside_the_sharded_region_stays_local(ranks: Any) -> None:
    assert ranks.run(count_outside) == [[2 * 2]] * 2


def two_layouts() -> None:
    one, other = Toy(), Toy()
    tokens = seeded(2, 11, WIDTH)
    expected = one(tokens)
    first = apply(one, None, 4, 1)
    second = apply(other, None, 2, 2)
    for _ in range(2):
        close(one(tokens), expected)
        close(other(tokens), expected)
    first.remove()
    close(other(tokens), expected)
    second.remove()


def test_two_models_with_different_layouts_live_in_one_process(ranks: Any) -> None:
    ranks.run(two_layouts, world_size=4)


def causal(order: Any, ulysses: int, ring: int) -> None:
    model = Toy()
    tokens = seeded(1, 13, WIDTH)
    expected = model(tokens, is_causal=True)
    with apply(model, None, ulysses, ring, order=order):
        close(model(tokens, is_causal=True), expected)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
def test_a_causal_model_equals_itself_in_both_orders(
    ranks: Any, ulysses: int, ring: int, order: str
) -> None:
    ranks.run(causal, order, ulysses, ring, world_size=ulysses * ring)


def masked(ulysses: int, ring: int) -> None:
    model = Toy()
    tokens = seeded(2, 9, WIDTH)
    mask = torch.rand(2, 1, 1, 9, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    expected = model(tokens, attn_mask=mask)
    with apply(model, None, ulysses, ring):
        close(model(tokens, attn_mask=mask), expected)
        with pytest.raises(ParallelConfigError, match=r"keys \d or 9"):
            model(tokens, attn_mask=mask[..., :8])
        with pytest.raises(ParallelConfigError, match=r"dropout_p=0\.5; legal: 0"):
            model(tokens, dropout_p=0.5)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_a_mask_of_the_whole_sequence_holds_for_a_split_one(
    ranks: Any, ulysses: int, ring: int
) -> None:
    ranks.run(masked, ulysses, ring)


# -- inputs and outputs ------------------------------------------------------------------------


def padded(ulysses: int, ring: int) -> None:
    model = Toy()
    plan = PLAN | {"blocks.0": {"tokens": replace(TOKENS, auto_pad=True)}}
    sizes = []

    def note(_: nn.Module, args: Any, output: Tensor) -> None:
        sizes.append(output.shape[1])

    with apply(model, plan, ulysses, ring):
        hook = model.blocks[1].register_forward_hook(note)
        for length in (9, 13, 8):
            tokens, positions = seeded(2, length, WIDTH), seeded(1, length, WIDTH, seed=1)
            size = -(-length // (ulysses * ring))
            found = model(tokens, positions)
            assert sizes.pop() == size
            hook.remove()
            expected = Toy()(tokens, positions)
            hook = model.blocks[1].register_forward_hook(note)
            close(found, expected)
        hook.remove()


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
def test_padding_is_never_attended_to_and_cut_where_it_was_added(
    ranks: Any, ulysses: int, ring: int
) -> None:
    ranks.run(padded, ulysses, ring, world_size=ulysses * ring)


def wrapped(kind: str) -> None:
    wrap: Any = {
        "tuple": lambda tokens: (None, tokens, "kept"),
        "list": lambda tokens: [tokens],
        "named tuple": lambda tokens: Between(tokens, None),
        "dataclass": Output,
    }[kind]
    gathers: Any = {"tuple": (None, SequenceParallelOutput(1))}.get(kind, SequenceParallelOutput(1))
    model = Toy(wrap)
    tokens = seeded(1, 7, WIDTH)
    expected = model(tokens)
    with apply(model, PLAN | {"end": gathers}):
        close(model(tokens), expected)


@pytest.mark.parametrize("kind", ["tuple", "list", "named tuple", "dataclass"])
def test_outputs_may_be_wrapped(ranks: Any, kind: str) -> None:
    ranks.run(wrapped, kind)


class TwoStreams(nn.Module):
    """Text that stays whole before an image that is split, in one tensor of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.join = Joint()
        self.out = nn.Identity()

    def forward(self, image: Tensor, text: Tensor, positions: Tensor, text_ids: Tensor) -> Tensor:
        return self.out(self.join(image, text, positions, text_ids))


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, image: Tensor, text: Tensor, positions: Tensor, text_ids: Tensor) -> Tensor:
        out = self.attn(torch.cat([text, image], 1) + positions)
        return out[:, text.shape[1] :]


JOINT_PLANS: dict[str, Any] = {
    "partial, by a tensor": SequenceParallelPartialInput(1, "text_ids"),
    "partial, by a number": SequenceParallelPartialInput(1, 5),
    "concatenated": SequenceParallelConcatInput(1, ("*", "image")),
}


def partial(kind: str, ulysses: int, ring: int) -> None:
    model = TwoStreams()
    plan: dict[str, Any] = {
        "join": {"image": TOKENS, "positions": JOINT_PLANS[kind]},
        "join.attn": SequenceParallelAttention(("*", "image")),
        "out": SequenceParallelOutput(1),
    }
    for length in (8, 11):
        image, text = seeded(1, length, WIDTH), seeded(1, 5, WIDTH, seed=1)
        positions = seeded(1, 5 + length, WIDTH, seed=2)
        expected = model(image, text, positions, text[0])
        with apply(model, plan, ulysses, ring):
            close(model(image, text, positions, text[0]), expected)


@pytest.mark.parametrize("kind", JOINT_PLANS)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_the_image_part_of_a_tensor_is_split_and_the_text_part_stays_whole(
    ranks: Any, kind: str, ulysses: int, ring: int
) -> None:
    ranks.run(partial, kind, ulysses, ring)


def cross() -> str:
    model = Crossing()
    plan: dict[str, Any] = {
        "": {"tokens": TOKENS},
        "inner.attn2": LOCAL_ATTENTION,
        "inner": SequenceParallelOutput(1),
    }
    # As many keys as this rank has tokens: shapes alone do not tell what attends to what.
    tokens, text = seeded(1, 8, WIDTH), seeded(1, 4, WIDTH, seed=1)
    expected = model(tokens, text)
    with apply(model, plan):
        close(model(tokens, text), expected)
    del plan["inner.attn2"]
    with apply(model, plan), pytest.raises(ParallelError) as caught:
        model(tokens, seeded(1, 3, WIDTH))
    return str(caught.value)


def test_cross_attention_to_a_whole_text_stays_local(ranks: Any) -> None:
    for text in ranks.run(cross):
        assert "attention of module 'inner.attn2' has 3 tokens on this rank; expected 4" in text
        assert "LOCAL_ATTENTION if its keys are not split" in text


# -- errors ------------------------------------------------------------------------------------


def mistakes() -> list[str]:
    texts = []
    tokens = seeded(1, 6, WIDTH)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"end": SequenceParallelOutput(1, expected_dims=4)}, {}),
        ({"end": (None, SequenceParallelOutput(1))}, {}),
        ({"end": SequenceParallelOutput(2)}, {}),
        ({}, {"positions": seeded(1, 5, WIDTH)}),
        ({}, {"positions": "none"}),
        ({"blocks.*": {"positions": (TOKENS, None)}}, {"positions": [tokens]}),
    ]
    for changed, options in cases:
        model = Toy()
        expected = model(tokens)
        plan = PLAN | changed
        with apply(model, plan):
            with pytest.raises(ParallelError) as caught:
                model(tokens, **options)
            texts.append(str(caught.value))
        with apply(model):
            close(model(tokens), expected)  # nothing was left behind
    model = Toy()
    del model.blocks[1]
    plan = {key: value for key, value in PLAN.items() if key != "end"}
    plan["refiner"] = SequenceParallelOutput(1, like="tokens")
    with apply(model, plan), pytest.raises(ParallelError) as caught:
        model(tokens)
    texts.append(str(caught.value))
    return texts


def test_a_call_that_does_not_fit_names_module_parameter_expected_and_found(ranks: Any) -> None:
    for texts in ranks.run(mistakes):
        assert "module 'end', output 0: expected 4 dimensions; found shape (1, 3, 8)" in texts[0]
        assert "module 'end': the plan names output 1; found 1 outputs" in texts[1]
        assert "module 'end', output 0: expected 3 tokens in dimension 2" in texts[2]
        assert (
            "module 'blocks.0', parameter 'positions': expected 6 tokens in dimension 1" in texts[3]
        )
        assert "parameter 'positions': expected a tensor; found str" in texts[4]
        assert "expected a tuple or list of 2 items; found 1 items" in texts[5]
        assert "refers to 'tokens', which this call has not split" in texts[6]


class Never(nn.Module):
    """Attention that no plan can find: it is reached through an object of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [attend]
        self.out = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.hidden[0](tokens))


def test_a_model_whose_attention_cannot_be_taken_over_is_refused() -> None:
    plan = {"": {"tokens": TOKENS}, "out": SequenceParallelOutput(1)}
    state = ParallelState(ParallelLayout())
    with pytest.raises(ParallelConfigError, match="no module of Never calls torch's"):
        apply_sequence_parallel(Never(), SequenceParallelConfig(), plan, state=state)
    plan_of_toy = PLAN | {"start": SequenceParallelAttention(("tokens",))}
    with pytest.raises(ParallelConfigError, match="attention of module 'start', a Identity"):
        apply_sequence_parallel(Toy(), SequenceParallelConfig(), plan_of_toy, state=state)


class Doubled(Processor):
    """Overrides the method that attends, and reaches it by super()."""

    def __call__(self, module: nn.Module, tokens: Tensor) -> Tensor:
        return 2 * super().__call__(module, tokens)


class Without(Attention):
    """Overrides the method that attends, and does not attend."""

    def forward(self, tokens: Tensor, keys: Tensor | None = None, **options: Any) -> Tensor:
        return 5 * tokens


class Tripled(Attention):
    def forward(self, tokens: Tensor, keys: Tensor | None = None, **options: Any) -> Tensor:
        return 3 * super().forward(tokens, keys, **options) + 1


def derived() -> None:
    tokens = seeded(1, 7, WIDTH)
    for attention in (Processed(Doubled()), Without(), Tripled()):
        model = Toy()
        model.blocks[0].attn = attention  # type: ignore[assignment]
        expected = model(tokens)
        with apply(model):
            close(model(tokens), expected)
        assert torch.equal(model(tokens), expected)


def test_methods_that_override_attention_still_override_it(ranks: Any) -> None:
    ranks.run(derived)


class Elsewhere(nn.Module):
    """Attention by a function that is kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.function = torch.nn.functional.scaled_dot_product_attention

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        heads = tokens.unsqueeze(1)
        return self.function(heads, heads, heads).squeeze(1)


class Several(nn.Module):
    """torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.inner(tokens, tokens, tokens, need_weights=False)[0]


def unknown() -> list[str]:
    texts = []
    for attention in (Elsewhere(), Several()):
        model = Toy()
        model.blocks[1].attn = attention  # type: ignore[assignment]
        with apply(model), pytest.raises(ParallelError) as caught:
            model(seeded(1, 6, WIDTH))
        texts.append(str(caught.value))
    return texts


def test_attention_that_was_not_found_is_an_error_in_the_first_call(ranks: Any) -> None:
    for elsewhere, several in ranks.run(unknown):
        assert (
            "the model calls scaled_dot_product_attention while its sequence is split" in elsewhere
        )
        assert "the model calls multi_head_attention_forward while" in several


def split_twice() -> list[str]:
    texts = []
    tokens = seeded(1, 8, WIDTH)
    tied = Toy()
    tied.blocks[1] = tied.blocks[0]
    twice = {"blocks.*": {"tokens": TOKENS}, "end": PLAN["end"]}
    for model, plan in ((Toy(), twice), (tied, PLAN)):
        with apply(model, plan), pytest.raises(ParallelError) as caught:
            model(tokens)
        texts.append(str(caught.value))
    return texts


def test_a_stream_that_is_split_twice_is_an_error(ranks: Any) -> None:
    for texts in ranks.run(split_twice):
        for text in texts:
            assert "'tokens' is split already, 8 tokens, and comes here with 4" in text


def wrong_mask() -> str:
    """Of a length that one rank alone could take for its own part."""
    model = Toy()
    with apply(model), pytest.raises(ParallelConfigError) as caught:
        model(seeded(1, 9, WIDTH), attn_mask=torch.ones(1, 1, 1, 5, dtype=torch.bool))
    return str(caught.value)


def test_a_mask_that_fits_one_rank_alone_is_an_error_on_all(ranks: Any) -> None:
    first, second = ranks.run(wrong_mask, timeout=20)
    assert "fits this rank's part of the keys, and that of another rank does not" in first
    assert "legal sizes here" in second


def apply_to_a_copy() -> None:
    model = Toy()
    tokens = seeded(1, 6, WIDTH)
    expected = model(tokens)
    handle = apply(model)
    inner = model.forward
    model.forward = functools.partial(inner)  # type: ignore[method-assign]
    handle.remove()
    model.forward = inner  # type: ignore[method-assign]
    close(model(tokens), expected)
    with apply(model):
        close(model(tokens), expected)


def test_a_model_whose_forward_was_wrapped_meanwhile_can_be_applied_again(ranks: Any) -> None:
    ranks.run(apply_to_a_copy)


def interrupted() -> None:
    model = Toy()
    tokens = seeded(1, 6, WIDTH)
    expected = model(tokens)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with apply(model):
        hook = model.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
        hook.remove()
        close(model(tokens), expected)


def test_an_interrupt_in_the_middle_leaves_nothing_behind(ranks: Any) -> None:
    ranks.run(interrupted)


# -- apply and remove --------------------------------------------------------------------------


def apply_and_remove() -> None:
    model = Toy()
    shared = Processor()
    model.last = Processed(shared)  # type: ignore[assignment]
    twin = Processed(shared)
    model.blocks[0].attn = Processed(shared)  # type: ignore[assignment]
    tokens = seeded(1, 6, WIDTH)
    expected = model(tokens)
    before = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    handle = apply(model)
    assert type(model.blocks[1].attn) is not Attention
    assert isinstance(model.blocks[1].attn, Attention)
    assert model.last.processor is not shared
    assert twin.processor is shared, "a model that is not hooked changed"
    shared.scale = 0.25  # attributes are still shared
    assert model.last.processor.scale == 0.25
    shared.scale = 0.5
    close(model(tokens), expected)
    with pytest.raises(ParallelConfigError, match="sequence-parallel already"):
        apply(model)
    handle.remove()
    handle.remove()
    after = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    assert after.keys() == before.keys()
    for name, (cls, attributes) in after.items():
        assert cls is before[name][0]
        assert attributes.keys() == before[name][1].keys()
        assert all(value is before[name][1][key] for key, value in attributes.items())
    assert torch.equal(model(tokens), expected)
    with pytest.raises(ParallelConfigError, match="not sequence-parallel"):
        remove_sequence_parallel(model)
    apply(model)
    remove_sequence_parallel(model)


def test_remove_gives_back_the_very_same_model(ranks: Any) -> None:
    ranks.run(apply_and_remove)


def replace_a_processor() -> str:
    model = Toy()
    model.blocks[0].attn = Processed(Processor())  # type: ignore[assignment]
    tokens = seeded(1, 6, WIDTH)
    with apply(model):
        model.blocks[0].attn.processor = Processor()  # type: ignore[assignment]
        with pytest.raises(ParallelError) as caught:
            model(tokens)
    return str(caught.value)


def test_a_processor_that_is_replaced_afterwards_is_an_error(ranks: Any) -> None:
    for text in ranks.run(replace_a_processor):
        assert "processor of module 'blocks.0.attn' was replaced after" in text


def copies() -> None:
    model = Toy()
    tokens = seeded(1, 7, WIDTH)
    expected = model(tokens)
    apply(model)
    twin = copy.deepcopy(model)
    close(twin(tokens), expected)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    close(twin(tokens), expected)


def test_a_copy_works_and_a_dropped_model_is_freed(ranks: Any) -> None:
    ranks.run(copies)
