"""A model is parallel once: parts, wholes, wrappers, copies and replaced modules are told apart."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_transformers import (
    PLAN,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    Crossing,
    Processed,
    Processor,
    Toy,
    apply,
    close,
    seeded,
)

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_sp import LOCAL_ATTENTION, SequenceParallelOutput, remove_sequence_parallel


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


OUTER: dict[str, Any] = {f"inner.{name}": entry for name, entry in PLAN.items()}


def nested() -> tuple[str, str]:
    model, tokens = Outer(), seeded(1, 7, WIDTH)
    expected = model(tokens)
    with apply(model.inner):
        with pytest.raises(ParallelConfigError) as around:
            apply(model, OUTER)
        close(model(tokens), expected)
    with apply(model, OUTER):
        with pytest.raises(ParallelConfigError) as inside:
            apply(model.inner)
        close(model(tokens), expected)
    with apply(model.inner):
        close(model(tokens), expected)
    return str(around.value), str(inside.value)


def test_what_holds_a_parallel_model_and_what_it_holds_are_refused(ranks: Any) -> None:
    for around, inside in ranks.run(nested):
        assert "the module holds 'inner', a Toy, which is sequence-parallel already" in around
        assert "the module is 'inner' of a Outer that is sequence-parallel already" in inside


def wrapped_by_compile(whole_graph: bool) -> None:
    model, tokens = Toy(), seeded(1, 7, WIDTH)
    expected = model(tokens)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=whole_graph)
    handle = apply(compiled)
    close(compiled(tokens), expected)
    close(model(tokens), expected)
    for same in (model, compiled, torch.compile(model, backend="eager")):
        with pytest.raises(ParallelConfigError, match="sequence-parallel already"):
            apply(same)
    handle.remove()
    close(compiled(tokens), expected)
    assert "forward" not in model.__dict__
    apply(compiled)
    remove_sequence_parallel(compiled)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("whole_graph", [True, False])
def test_a_compiled_model_may_be_given_in_place_of_the_model(ranks: Any, whole_graph: bool) -> None:
    ranks.run(wrapped_by_compile, whole_graph)


def copied() -> list[str]:
    model, tokens, texts = Toy(), seeded(1, 7, WIDTH), []
    model.last = Processed(Processor())  # type: ignore[assignment]
    expected = model(tokens)
    handle = apply(model)
    twin = copy.deepcopy(model)
    holder = nn.ModuleList([twin])
    for call in (remove_sequence_parallel, apply):
        with pytest.raises(ParallelConfigError) as caught:
            call(twin)
        texts.append(str(caught.value))
    with pytest.raises(ParallelConfigError, match="holds '0', a Toy, which is"):
        apply(holder)
    close(twin(tokens), expected)
    handle.remove()
    model.blocks[0].attn = Attention()  # of the original: the copy has its own
    close(twin(tokens), expected)
    with apply(copy.deepcopy(model)) as other:
        assert not other.removed
    return texts


def test_a_copy_of_a_parallel_model_cannot_be_changed_back_and_says_so(ranks: Any) -> None:
    for texts in ranks.run(copied):
        for text in texts:
            assert "the module is a copy of a sequence-parallel model" in text
            assert "remove() of that one's handle before copying" in text


def copied_with_local_attention() -> None:
    plan: dict[str, Any] = {
        "": {"tokens": TOKENS},
        "inner.attn2": LOCAL_ATTENTION,
        "inner": SequenceParallelOutput(1),
    }
    model = Crossing()
    inputs = seeded(1, 7, WIDTH), seeded(1, 3, WIDTH, seed=1)
    expected = model(*inputs)
    with apply(model, plan):
        twin = copy.deepcopy(model)
        close(twin(*inputs), expected)
        close(model(*inputs), expected)
    close(twin(*inputs), expected)


def test_a_copy_whose_hooks_are_copied_too_shares_what_the_ranks_know(ranks: Any) -> None:
    ranks.run(copied_with_local_attention)


def put_attention(model: Any) -> None:
    model.blocks[0].attn = Attention()


def put_block(model: Any) -> None:
    model.blocks[1] = Block()


def put_blocks(model: Any) -> None:
    model.blocks = nn.ModuleList([Block(), Block()])


def put_end(model: Any) -> None:
    model.end = nn.Identity()


def put_nothing(model: Any) -> None:
    model.blocks[0].attn = None


REPLACED: dict[str, tuple[Callable[[Any], None], str]] = {
    "an attention": (put_attention, "'blocks.0.attn'"),
    "a block": (put_block, "'blocks.1'"),
    "all blocks": (put_blocks, "'blocks'"),
    "what is gathered": (put_end, "'end'"),
    "by nothing": (put_nothing, "'blocks.0.attn'"),
}


def replaced(what: str) -> list[str]:
    texts = []
    for called_before in (False, True):
        model, tokens = Toy(), seeded(1, 6, WIDTH)
        with apply(model):
            if called_before:
                model(tokens)
            REPLACED[what][0](model)
            gc.collect()
            with pytest.raises(ParallelError) as caught:
                model(tokens)
            texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("what", REPLACED)
def test_a_module_that_is_replaced_afterwards_is_an_error(ranks: Any, what: str) -> None:
    for texts in ranks.run(replaced, what):
        for text in texts:
            assert f"module {REPLACED[what][1]} was replaced after apply" in text
            assert "remove the handle, change modules, apply again" in text


class Wrapper(nn.Module):
    """As those of torch that save memory or shard weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def wrapped_afterwards() -> None:
    model, tokens = Toy(), seeded(1, 7, WIDTH)
    expected = model(tokens)
    with apply(model):
        model.blocks[0] = Wrapper(model.blocks[0])
        close(model(tokens), expected)
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
        close(model(tokens), expected)
        model.refiner = Attention()  # which no plan is about, but whose attention was taken over
        with pytest.raises(ParallelError, match="'refiner' was replaced"):
            model(tokens)


def test_a_module_that_is_wrapped_afterwards_still_does_its_part(ranks: Any) -> None:
    ranks.run(wrapped_afterwards)
