"""An unmodified Flux transformer of diffusers equals itself on several ranks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omni_group_coordinator import ParallelConfigError, ParallelError, record_traffic
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    SequenceParallelConfig,
    SequenceParallelInput,
    apply_sequence_parallel,
    remove_sequence_parallel,
)
from omni_sp.plan_source import converted_plan
from omni_sp.plans import KNOWN_PLANS

diffusers = pytest.importorskip("diffusers")

RTOL = 1e-5


def flux(heads: int = 4, *, layers: int = 1, single: int = 2) -> nn.Module:
    """A small Flux with random weights; the same on every rank."""
    torch.manual_seed(7)
    model = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    for parameter in model.parameters():  # fresh adaLN layers are too tame to show a mistake
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs(height: int, width: int, text: int, *, batch: int = 1, seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return {
        "hidden_states": random(batch, height * width, 8),
        "encoder_hidden_states": random(batch, text, 24),
        "pooled_projections": random(batch, 20),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def run_flux(ulysses: int, heads: int, sizes: list[tuple[int, int, int, int]]) -> list[float]:
    """The error of each call, on one hooked model, one size after another."""
    model = flux(heads)
    state = ParallelState(ParallelLayout(ulysses=ulysses))
    calls = [inputs(h, w, text, batch=batch, seed=i) for i, (h, w, text, batch) in enumerate(sizes)]
    with torch.no_grad():
        expected = [model(**call)[0] for call in calls]
        with apply_sequence_parallel(model, SequenceParallelConfig(ulysses), state=state):
            found = [model(**call)[0] for call in calls]
        after = model(**calls[0])[0]
    assert torch.equal(after, expected[0]), "not the original after remove"
    state.destroy()
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_equals_one_process_for_any_length_and_number_of_heads(
    ranks: Any, world_size: int, heads: int
) -> None:
    sizes = [(4, 4, 6, 1), (3, 3, 5, 2), (1, 3, 7, 1), (5, 7, 1, 3), (4, 1, 1, 1), (4, 4, 6, 1)]
    for errors in ranks.run(run_flux, world_size, heads, sizes, world_size=world_size):
        assert max(errors) < RTOL


def run_in_part_of_the_world() -> float:
    """cfg=2, ulysses=2: the sequence is split inside each guidance group."""
    model = flux()
    state = ParallelState(ParallelLayout(cfg=2, ulysses=2))
    call = inputs(3, 5, 4, seed=state.cfg.rank_in_group)
    with torch.no_grad():
        expected = model(**call)[0]
        with state.use():
            apply_sequence_parallel(model, SequenceParallelConfig(2))
            found = model(**call)[0]
    return relative_error(found, expected)


def test_sequence_groups_beside_a_guidance_dimension_keep_to_themselves(ranks: Any) -> None:
    assert max(ranks.run(run_in_part_of_the_world, world_size=4)) < RTOL


def count_bytes(ulysses: int) -> tuple[int, int, int]:
    model = flux()
    state = ParallelState(ParallelLayout(ulysses=ulysses))
    call = inputs(4, 4, 8)
    with (
        torch.no_grad(),
        apply_sequence_parallel(model, SequenceParallelConfig(ulysses), state=state),
        record_traffic() as traffic,
    ):
        model(**call)
    return (
        traffic.bytes_sent["all_to_all"],
        traffic.calls["all_to_all"],
        traffic.bytes_sent["all_gather"],
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_sends_what_the_formula_says(ranks: Any, world_size: int) -> None:
    layers, tokens, width, size = 3, 24, 64, 4
    whole_query = tokens * width * size
    each = whole_query * 4 * (world_size - 1) // world_size**2
    gathered = 16 // world_size * 8 * size * (world_size - 1)
    for sent, calls, joined in ranks.run(count_bytes, world_size, world_size=world_size):
        assert (sent, calls, joined) == (layers * each, 2 * layers, gathered)


def break_the_call() -> list[str]:
    model = flux()
    state = ParallelState(ParallelLayout(ulysses=2))
    good = inputs(3, 3, 4)
    texts = []
    with torch.no_grad():
        expected = model(**good)[0]
        handle = apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
        for wrong in (
            {"hidden_states": torch.randn(9, 8)},
            {"img_ids": torch.randn(8, 3)},
            {"encoder_hidden_states": [1, 2]},
        ):
            with pytest.raises(ParallelError) as caught:
                model(**(good | wrong))
            texts.append(str(caught.value))
        tiny = inputs(1, 1, 1)  # less tokens than ranks: they stay whole
        handle.remove()
        alone = model(**tiny)[0]
        handle = apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
        assert relative_error(model(**tiny)[0], alone) < RTOL
        with pytest.raises(RuntimeError):  # the model's own error, in the middle of the region
            model(**(good | {"pooled_projections": torch.randn(1, 3)}))
        with pytest.raises(ParallelConfigError, match="already"):
            apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
        assert relative_error(model(**good)[0], expected) < RTOL  # nothing was left behind
        with pytest.raises(ParallelError, match="outside its sequence-parallel model"):
            model.get_submodule("proj_out")(torch.randn(1, 5, 64))
        remove_sequence_parallel(model)
        assert handle.removed
        assert "forward" not in model.__dict__
        assert torch.equal(model(**good)[0], expected)
        with pytest.raises(ParallelConfigError, match="not sequence-parallel"):
            remove_sequence_parallel(model)
    return texts


def test_a_call_that_fails_names_what_was_expected_and_leaves_nothing(ranks: Any) -> None:
    for texts in ranks.run(break_the_call):
        assert "model FluxTransformer2DModel, parameter 'hidden_states'" in texts[0]
        assert "expected 3 dimensions; found shape (9, 8)" in texts[0]
        assert (
            "'img_ids': expected 9 tokens in dimension -2, as many as 'hidden_states'" in texts[1]
        )
        assert "'encoder_hidden_states', item 0: expected a tensor; found int" in texts[2]


def copy_and_drop() -> None:
    model = flux()
    state = ParallelState(ParallelLayout(ulysses=2))
    call = inputs(3, 3, 4)
    with torch.no_grad():
        apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        found = twin(**call)[0]
        plain = flux()
        for parameter in plain.parameters():
            parameter.mul_(1.5)
        assert relative_error(found, plain(**call)[0]) < RTOL
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_copied_model_runs_its_own_weights_and_a_dropped_one_is_freed(ranks: Any) -> None:
    ranks.run(copy_and_drop)


def other_attention() -> list[str]:
    """A model whose attention is not torch's own must not pass for a parallel one."""
    texts = []
    state = ParallelState(ParallelLayout(ulysses=2))

    def attend(attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states

    model = flux()
    for block in model.single_transformer_blocks:  # type: ignore[union-attr]
        block.attn.processor = attend
    with pytest.raises(ParallelConfigError) as refused:
        apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
    texts.append(str(refused.value))
    model = flux(layers=0)
    apply_sequence_parallel(model, SequenceParallelConfig(2), state=state)
    for block in model.single_transformer_blocks:  # type: ignore[union-attr]
        block.attn.processor = attend
    with torch.no_grad(), pytest.raises(ParallelError) as caught:
        model(**inputs(3, 3, 4))
    texts.append(str(caught.value))
    return texts


def test_attention_that_is_not_torchs_own_is_an_error(ranks: Any) -> None:
    for refused, caught in ranks.run(other_attention):
        assert "attention of module 'single_transformer_blocks.0.attn'" in refused
        assert "'single_transformer_blocks.0.attn' was replaced after" in caught


def padded_plan(ulysses: int, ring: int) -> list[float]:
    """With shards padded to one length: biases and shifts make padding anything but zero."""
    model = flux()
    plan: Any = dict(KNOWN_PLANS["FluxTransformer2DModel"])
    padded = SequenceParallelInput(1, expected_dims=3, attends=True, auto_pad=True)
    plan[""] = plan[""] | {"hidden_states": padded, "encoder_hidden_states": padded}
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring)
    calls = [inputs(3, 5, 5), inputs(3, 3, 7, batch=2), inputs(4, 4, 8)]
    with torch.no_grad():
        expected = [model(**call)[0] for call in calls]
        with apply_sequence_parallel(model, config, plan, state=state):
            found = [model(**call)[0] for call in calls]
    return [relative_error(a, b) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (2, 2)])
def test_padded_tokens_contribute_nothing(ranks: Any, ulysses: int, ring: int) -> None:
    for errors in ranks.run(padded_plan, ulysses, ring, world_size=ulysses * ring):
        assert max(errors) < RTOL


def declared_plan() -> float:
    """By the plan that diffusers declares for its own context parallelism."""
    model = flux()
    plan = converted_plan(model._cp_plan)  # type: ignore[arg-type]
    state = ParallelState(ParallelLayout(ulysses=2))
    call = inputs(3, 5, 5)
    with torch.no_grad():
        expected = model(**call)[0]
        with apply_sequence_parallel(model, SequenceParallelConfig(2), plan, state=state):
            return relative_error(model(**call)[0], expected)


def test_the_plan_that_diffusers_declares_gives_the_same_result(ranks: Any) -> None:
    assert max(ranks.run(declared_plan)) < RTOL


def chosen_backend(ulysses: int, ring: int, exchange: Any) -> float | str:
    model = flux()
    model.set_attention_backend("_native_math")  # type: ignore[operator]
    state = ParallelState(ParallelLayout(ulysses=ulysses, ring=ring))
    config = SequenceParallelConfig(ulysses, ring, kv_exchange=exchange)
    call = inputs(3, 5, 5)
    try:
        with torch.no_grad():
            expected = model(**call)[0]
            with apply_sequence_parallel(model, config, state=state):
                compiled = torch.compile(model, backend="eager", fullgraph=True)
                errors = [relative_error(m(**call)[0], expected) for m in (model, compiled)]
                return max(errors)
    except ParallelConfigError as error:
        return str(error)
    finally:
        model.set_attention_backend("native")  # type: ignore[operator]  diffusers' is global


def test_the_attention_backend_of_the_model_is_used(ranks: Any) -> None:
    assert max(ranks.run(chosen_backend, 2, 1, "ring")) < RTOL
    assert max(ranks.run(chosen_backend, 1, 2, "allgather")) < RTOL
    for text in ranks.run(chosen_backend, 1, 2, "ring"):
        assert "diffusers' backend '_native_math' does not give" in text
        assert "legal: kv_exchange='allgather', Ulysses" in text


def test_one_rank_is_the_identity_and_needs_no_process_group() -> None:
    model = flux()
    before = dict(model.__dict__)
    with apply_sequence_parallel(
        model, SequenceParallelConfig(), state=ParallelState(ParallelLayout())
    ):
        assert dict(model.__dict__) == before
        assert not model.proj_out._forward_hooks
