"""The strategy, alone and beside those that split the sequence and guidance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from stock_sharded import CASES, randomised
from torch.distributed.tensor import DTensor
from toy_sharded import config, differences, equal, seeded, sharing, snapshot, toy

from omni_group_coordinator import ParallelConfigError
from omni_hsdp import apply_hsdp_to_model, handle_of, strategy
from omni_parallel_state import ParallelLayout, ParallelState


def pipeline():
    return SimpleNamespace(
        transformer=toy(), unet=toy(2, seed=4), vae=toy(1, seed=5), scheduler=None
    )


def is_sharded(module):
    return any(isinstance(p, DTensor) for p in module.parameters())


def apply_strategy(**options):
    pipe, x = pipeline(), seeded(2, 6)
    models = (pipe.transformer, pipe.unet, pipe.vae)
    with sharing(2) as state:
        before = [(model(x), snapshot(model)) for model in models]
        with strategy.apply(pipe, state, **options):
            sharded = [is_sharded(model) for model in models]
            same = [equal(model(x), out) for model, (out, _) in zip(models, before, strict=True)]
        rest = [differences(old, snapshot(m)) for m, (_, old) in zip(models, before, strict=True)]
        handle = strategy.apply(pipe.vae, state)
        alone = is_sharded(pipe.vae)
        handle.remove()
        return sharded, all(same), rest, alone


def test_it_shards_what_predicts_noise(ranks):
    for found in ranks.run(apply_strategy, world_size=2):
        assert found == ([True, True, False], True, [[], [], []], True)


def test_it_shards_the_components_that_it_is_asked_for(ranks):
    for found in ranks.run(apply_strategy, components=("vae",), world_size=2):
        assert found[0] == [False, False, True]


def half_way():
    pipe = pipeline()
    before = snapshot(pipe.transformer)
    with sharing(2) as state:
        apply_hsdp_to_model(pipe.unet, config())
        with pytest.raises(ParallelConfigError, match="already"):
            strategy.apply(pipe, state)
        return differences(before, snapshot(pipe.transformer)), is_sharded(pipe.unet)


def test_a_failure_half_way_leaves_nothing_behind(ranks):
    assert ranks.run(half_way, world_size=2) == [([], True)] * 2


def test_a_pipeline_without_such_modules():
    with sharing(1) as state:
        with pytest.raises(ParallelConfigError, match=r"transformer.*its modules: vae"):
            strategy.apply(SimpleNamespace(vae=toy()), state)
        with pytest.raises(ParallelConfigError, match=r"object lacks a module .*its modules: none"):
            strategy.apply(object(), state)
        with pytest.raises(ParallelConfigError, match="lacks a module among text_encoder;"):
            strategy.apply(pipeline(), state, components="text_encoder")
        with pytest.raises(ParallelConfigError, match="text_encoder"):
            strategy.apply(pipeline(), state, components=("transformer", "text_encoder"))
        with pytest.raises(ParallelConfigError, match=r"dtype: no option.*legal: param_dtype"):
            strategy.apply(pipeline(), state, dtype=torch.float16)


def test_one_rank_is_left_alone():
    pipe = pipeline()
    before = snapshot(pipe.transformer)
    with sharing(1) as state, strategy.apply(pipe, state):
        pass
    assert differences(before, snapshot(pipe.transformer)) == []


def beside_sequence_parallelism(first):
    from omni_sp import SequenceParallelConfig, apply_sequence_parallel

    case = CASES["QwenImage"]
    model = randomised(case.build)
    state = ParallelState(ParallelLayout(ulysses=2, fs=2))
    split = SequenceParallelConfig(2, 1)
    with state.use(), torch.no_grad():
        before = snapshot(model)
        sp = apply_sequence_parallel(model, split, state=state)
        expected = model(**case.call())
        if first == "hsdp":
            sp.remove()
        apply_hsdp_to_model(model, config(), state=state)
        if first == "hsdp":
            sp = apply_sequence_parallel(model, split, state=state)
        found = [equal(model(**case.call()), expected) for _ in range(2)]
        order = [sp, handle_of(model)] if first == "hsdp" else [handle_of(model), sp]
        for handle in order:
            handle.remove()
        return found, differences(before, snapshot(model))


@pytest.mark.parametrize("first", ["hsdp", "sp"])
def test_beside_sequence_parallelism_over_the_same_ranks(ranks, first):
    pytest.importorskip("omni_sp")
    pytest.importorskip("diffusers")
    found = ranks.run(beside_sequence_parallelism, first, world_size=2)
    assert found == [([True, True], [])] * 2


def beside_guidance():
    from omni_cfgp import apply_cfg_parallel

    model = toy()
    branches = [seeded(1, 6), seeded(1, 6, seed=1)]
    state = ParallelState(ParallelLayout(cfg=2, fs=2))
    with state.use(), torch.no_grad():
        before = snapshot(model)
        expected = [model(x) for x in branches]
        apply_hsdp_to_model(model, config(), state=state)
        with apply_cfg_parallel(model, state=state):
            guided = torch.cat([model(x) for x in branches])
            found = [torch.equal(guided, torch.cat(expected)), is_sharded(model)]
        handle_of(model).remove()
        return found, differences(before, snapshot(model))


def test_beside_guidance_over_the_same_ranks(ranks):
    pytest.importorskip("omni_cfgp")
    assert ranks.run(beside_guidance, world_size=2) == [([True, True], [])] * 2
