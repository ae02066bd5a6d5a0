"""Which arguments of a call are part of its batch, and its rows apart and together again."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_results import Output, same, seeded

from omni_parallel_state.denoising.row_results import joined, rows_of
from omni_parallel_state.denoising.rows import RowPlan, plan_rows

NAMES = ["hidden_states", "timestep", "encoder_hidden_states"]


def plan(*args: Any, shared: tuple[str, ...] = (), **kwargs: Any) -> RowPlan | None:
    return plan_rows(args, kwargs, lambda i: NAMES[i] if i < len(NAMES) else "", shared)


def paths(*args: Any, **kwargs: Any) -> set[Any]:
    found = plan(*args, **kwargs)
    assert found is not None
    return {path for path, _ in found.dims}


def rows(count: int, seed: int = 0) -> Tensor:
    return seeded(count, 3, 4, seed=seed)


def test_rows_are_those_of_the_sample():
    assert plan(rows(3)).rows == 3
    assert plan(encoder_hidden_states=rows(2), hidden_states=rows(4)).rows == 4
    assert plan([rows(1), rows(1)]).rows == 2
    assert plan(sample=rows(2)).rows == 2
    assert plan(rows(1)) is None
    assert plan() is None
    assert plan("text") is None
    assert plan(seeded()) is None


def test_positional_and_named_inputs_are_found_where_they_lie():
    text, times = rows(2, seed=1), seeded(2)
    expected = {(0,), (1,), ("encoder_hidden_states",)}
    assert paths(rows(2), times, encoder_hidden_states=text, guidance=seeded(1)) == expected
    assert paths(rows(2), seeded(), text, None) == {(0,), (2,)}


def test_inputs_within_dicts_and_lists_are_found():
    added = {"text_embeds": seeded(2, 5), "more": [seeded(2), seeded(3)], "size": (4, 4)}
    expected = {(0,), ("added", "text_embeds"), ("added", "more", 0)}
    assert paths(rows(2), added=added) == expected


def test_what_all_samples_share_stays_whole_whatever_its_shape():
    tables = {
        "image_rotary_emb": (seeded(2, 4), seeded(2, 4)),
        "rope": seeded(2, 8),
        "freqs_cis": seeded(2, 8),
        "img_ids": seeded(2, 3),
        "txt_ids": seeded(2, 3),
    }
    assert paths(rows(2), **tables) == {(0,)}
    assert paths(rows(2), nested={"rotary": seeded(2, 4)}) == {(0,)}
    assert paths(rows(2), table=seeded(2, 4)) == {(0,), ("table",)}
    assert paths(rows(2), table=seeded(2, 4), shared=("table",)) == {(0,)}


def test_an_input_of_several_rows_for_each_sample():
    found = plan(sample=seeded(2, 4), down_block_additional_residuals=[seeded(4, 3)], t=seeded(6))
    assert found.rows == 2
    _, kwargs = found.take((), {"down_block_additional_residuals": [seeded(4, 3)]}, 1, 2)
    assert torch.equal(kwargs["down_block_additional_residuals"][0], seeded(4, 3)[2:])


def test_rows_in_the_second_dimension():
    text = seeded(5, 2, 3)
    found = plan(rows(2), encoder_hidden_states_llama3=text)
    _, kwargs = found.take((), {"encoder_hidden_states_llama3": text}, 0, 1)
    assert torch.equal(kwargs["encoder_hidden_states_llama3"], text[:, :1])


def test_lists_of_samples_are_cut_as_lists():
    x = [seeded(3, 4), seeded(5, 4), seeded(2, 4)]
    args, kwargs = plan(x=x, cap_feats=x[::-1]).take((x,), {"x": x, "cap_feats": x[::-1]}, 1, 3)
    assert args[0] == x
    assert [len(t) for t in kwargs["x"]] == [5, 2]
    assert [len(t) for t in kwargs["cap_feats"]] == [5, 3]


def test_what_a_call_takes_out_of_its_arguments_is_still_in_the_callers():
    options = {"scale": seeded(2), "list": [rows(2)]}
    _, kwargs = plan(rows(2), options=options).take((), {"options": options}, 0, 1)
    kwargs["options"].pop("scale")
    kwargs["options"]["list"].clear()
    assert list(options) == ["scale", "list"]
    assert len(options["list"]) == 1


SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@settings(deadline=None)
@given(SIZES, st.integers(1, 2))
def test_rows_that_are_taken_apart_and_joined_are_the_whole(sizes, share):
    total = sum(sizes)
    batch = seeded(total * share, 3)
    samples = [seeded(i + 1, 2, seed=i) for i in range(total)]
    wholes = [
        batch,
        (batch, batch.half()),
        (samples,),
        Output(batch),
        {"a": batch, "b": (batch * 2, "text")},
        (None, batch),
    ]
    for whole in wholes:
        parts, start = [], 0
        for size in sizes:
            parts.append(rows_of(whole, start, start + size, total))
            start += size
        same(joined(parts), whole)
