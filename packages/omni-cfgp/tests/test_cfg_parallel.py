"""`CFGParallelMixin`: every rank gets the prediction that one process computes."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_denoisers import WIDTH, Toy, close, in_tuple, prompts_of, state_of
from toy_results import seeded

from omni_cfgp import CFGParallelMixin
from omni_group_coordinator import ParallelConfigError, ParallelError, record_traffic
from omni_parallel_state import ParallelLayout, ParallelState

LATENTS = seeded(1, 6, WIDTH, seed=5)


class Mixed(CFGParallelMixin):
    def __init__(self, transformer: Any = None) -> None:
        self.transformer = Toy() if transformer is None else transformer


def two_dtypes(sample: Tensor) -> Any:
    """The first output is a tuple: video and sound."""
    return ((sample, sample[:, :3, :5].half()), "more")


def branches_of(count: int, lengths: Any = ()) -> list[dict[str, Any]]:
    """The inputs of branches, in a latent for each, and prompts of some lengths."""
    return [
        {"hidden_states": LATENTS + 0.1 * i, "encoder_hidden_states": prompt}
        for i, prompt in enumerate(prompts_of(count, lengths))
    ]


def alone(function: Any, *args: Any, **options: Any) -> Any:
    """What one process gives."""
    with ParallelState(ParallelLayout()).use():
        return function(*args, **options)


def in_world(function: Any, world: int, *args: Any) -> Any:
    with state_of(world).use():
        return function(*args)


def equal(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert type(found) is tuple
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
    else:
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


# -- two branches ------------------------------------------------------------------------------


def compute_two(wrap: Any, lengths: Any, options: Any) -> list[Any]:
    """Two steps: what they give, and how often this rank called the transformer."""
    pipeline = Mixed(Toy(wrap))
    inputs = branches_of(2, lengths)
    found = []
    for step in range(2):
        for branch in inputs:
            branch["hidden_states"] = branch["hidden_states"] * (1 + step)
        pipeline.transformer.calls = 0
        prediction = pipeline.predict_noise_maybe_with_cfg(True, 4.0, *inputs, **options)
        found.append((prediction, pipeline.transformer.calls))
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (in_tuple, {"cfg_normalize": False}),
        (in_tuple, {}),
        (in_tuple, {"output_slice": 4}),
        (two_dtypes, {"cfg_normalize": False, "output_slice": 2}),
        (lambda sample: ((sample,),), {"cfg_normalize": True}),
    ],
    ids=["plain", "normalized", "sliced", "tuple", "tuple of one"],
)
def test_two_branches_on_some_ranks(ranks: Any, world: int, wrap: Any, options: Any) -> None:
    """Spare ranks call no transformer, and get the prediction."""
    expected = alone(compute_two, wrap, (4, 4), options)
    results = ranks.run(in_world, compute_two, world, wrap, (4, 4), options, world_size=world)
    for rank, steps in enumerate(results):
        for (found, calls), (wanted, _) in zip(steps, expected, strict=True):
            equal(found, wanted)
            assert calls == (1 if rank < 2 else 0)


def test_prompts_may_have_different_lengths(ranks: Any) -> None:
    expected = alone(compute_two, in_tuple, (9, 3), {})
    for steps in ranks.run(in_world, compute_two, 2, in_tuple, (9, 3), {}):
        for (found, _), (wanted, _) in zip(steps, expected, strict=True):
            equal(found, wanted)


def compute_dtypes() -> list[Tensor]:
    pipeline = Mixed()
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        inputs = [{k: v.to(dtype) for k, v in branch.items()} for branch in branches_of(2)]
        found.append(pipeline.predict_noise_maybe_with_cfg(True, 4.0, *inputs))
        assert found[-1].dtype == dtype
    return found


def test_inputs_may_change_their_dtype(ranks: Any) -> None:
    expected = alone(compute_dtypes)
    for found in ranks.run(in_world, compute_dtypes, 2):
        equal(tuple(found), tuple(expected))


def traffic() -> list[Any]:
    seen = []
    for wrap in (in_tuple, two_dtypes):
        pipeline = Mixed(Toy(wrap))
        for _ in range(2):
            with record_traffic() as recorded:
                pipeline.predict_noise_maybe_with_cfg(True, 4.0, *branches_of(2))
        seen.append((dict(recorded.calls), recorded.total_bytes))
    with record_traffic() as recorded:
        pipeline.predict_noise_maybe_with_cfg(False, 4.0, branches_of(1)[0], None)
    seen.append((recorded.total_calls, pipeline.transformer.calls))
    return seen


def test_a_step_is_one_collective_and_one_without_guidance_none(ranks: Any) -> None:
    elements = 6 * WIDTH
    for found in ranks.run(in_world, traffic, 2):
        assert found[0] == ({"all_gather": 1}, elements * 4)
        assert found[1] == ({"all_gather": 1}, elements * 4 + 3 * 5 * 2)
        assert found[2] == (0, 3)


def test_without_guidance_the_positive_branch_alone_is_computed() -> None:
    pipeline = Mixed()
    positive = branches_of(1)[0]
    expected = Toy()(**positive)[0]
    call = pipeline.predict_noise_maybe_with_cfg
    close(alone(call, False, 4.0, positive, None), expected)
    one = alone(call, False, 4.0, positive, None, output_slice=2)
    close(one, expected[:, :2])
    many = [positive, {"hidden_states": "never used"}]
    call = pipeline.predict_noise_with_multi_branch_cfg
    close(alone(call, False, 4.0, many, output_slice=2), one)
    assert pipeline.transformer.calls == 3


def test_a_tuple_of_one_stays_a_tuple_of_one() -> None:
    pipeline = Mixed(Toy(lambda sample: ((sample,),)))
    inputs = branches_of(2)
    one, other = (Toy()(**branch)[0] for branch in inputs)
    found = alone(pipeline.predict_noise_maybe_with_cfg, True, 4.0, *inputs, False, 5)
    assert type(found) is tuple
    assert len(found) == 1
    close(found[0], (other + 4.0 * (one - other))[:, :5])


def test_zeros_are_normalized_to_zeros() -> None:
    class Zero(Toy):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            return (super().forward(hidden_states, **kwargs)[0] * 0,)

    pipeline = Mixed(Zero())
    found = alone(pipeline.predict_noise_maybe_with_cfg, True, 4.0, *branches_of(2))
    assert torch.equal(found, torch.zeros(1, 6, WIDTH))


def test_kwargs_reach_the_combination_only_if_there_are_some() -> None:
    class Own(Mixed):
        def combine_cfg_noise(self, positive: Any, negative: Any, *args: Any, **more: Any) -> Any:
            return args, more

    call = Own().predict_noise_maybe_with_cfg
    assert alone(call, True, 4.0, *branches_of(2), False) == ((4.0, False), {})
    more = {"kwargs": {"a": 1}}
    assert alone(call, True, 4.0, *branches_of(2), **more) == ((4.0, True), more)


# -- any number of branches --------------------------------------------------------------------

SCALES = {"one": 3.0, "two": 1.5, "three": 0.7}


def scales(count: int) -> dict[str, float]:
    return dict(list(SCALES.items())[: count - 1])


def compute_many(count: int) -> list[tuple[Any, int]]:
    """With the inputs as they are, and with another input for one branch after the other."""
    found = []
    for changed in (None, *range(count)):
        pipeline = Mixed(Toy(two_dtypes))
        inputs = branches_of(count, [3 + 2 * i for i in range(count)])
        if changed is not None:
            inputs[changed]["hidden_states"] = inputs[changed]["hidden_states"] + 0.5
        prediction = pipeline.predict_noise_with_multi_branch_cfg(True, scales(count), inputs)
        found.append((prediction, pipeline.transformer.calls))
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_branch_counts(ranks: Any, count: int, world: int) -> None:
    expected = alone(compute_many, count)
    results = ranks.run(in_world, compute_many, world, count, world_size=world)
    for index, (wanted, _) in enumerate(expected):
        assert sum(found[index][1] for found in results) == count
        for found in results:
            equal(found[index][0], wanted)
        if index:
            assert (wanted[0] - expected[0][0][0]).abs().max() > 1e-2


def test_a_branch_for_which_there_is_no_scale_is_an_error() -> None:
    call = Mixed().predict_noise_with_multi_branch_cfg
    for scale in (4.0, scales(2), scales(4)):
        with pytest.raises(ParallelConfigError, match=r"guidance scales for 3 branches"):
            alone(call, True, scale, branches_of(3))
    with pytest.raises(ParallelError, match="guidance of no branch"):
        alone(call, True, 4.0, [])
    with pytest.raises(ParallelError, match="pass negative_kwargs"):
        alone(Mixed().predict_noise_maybe_with_cfg, True, 4.0, branches_of(1)[0], None)


# -- groups and pipelines ----------------------------------------------------------------------


def two_pipelines() -> tuple[Tensor, ...]:
    """Whose predictions of the same inputs have different shapes."""
    wide = Mixed(Toy(lambda sample: (torch.cat([sample, sample], -1),)))
    pipelines = (Mixed(), wide, Mixed(), wide)
    return tuple(p.predict_noise_maybe_with_cfg(True, 4.0, *branches_of(2)) for p in pipelines)


def test_pipelines_of_one_process_know_nothing_of_each_other(ranks: Any) -> None:
    expected = alone(two_pipelines)
    for found in ranks.run(in_world, two_pipelines, 2):
        equal(found, expected)


def forgotten() -> bool:
    state = state_of(2)
    with state.use():
        Mixed().predict_noise_maybe_with_cfg(True, 4.0, *branches_of(2))
    gone = weakref.ref(state.cfg)
    state.destroy()
    del state
    gc.collect()
    return gone() is None


def test_groups_are_let_go(ranks: Any) -> None:
    assert ranks.run(forgotten) == [True] * 2


def validity() -> tuple[list[bool], list[str]]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("omni_cfgp").addHandler(handler)
    cases = [(4.0, True), (1.0, True), (4.0, False), (0.5, False)]
    found = [Mixed().check_cfg_parallel_validity(*case) for case in cases]
    logging.getLogger("omni_cfgp").removeHandler(handler)
    return found, records


def test_guidance_that_leaves_ranks_idle_is_told(ranks: Any) -> None:
    for found, records in ranks.run(in_world, validity, 3, world_size=3):
        assert found == [True, False, False, False]
        assert records == [
            "the guidance scale 1 is not above 1, so 2 of the 3 ranks of the cfg group idle",
            *["there is no negative prompt, so 2 of the 3 ranks of the cfg group idle"] * 2,
        ]
    assert alone(validity) == ([True] * 4, [])


def test_the_loop_is_the_pipelines() -> None:
    with pytest.raises(NotImplementedError):
        Mixed().diffuse()
