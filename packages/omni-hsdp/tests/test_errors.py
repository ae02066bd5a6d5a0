"""What cannot work, said before any rank communicates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_sharded import Toy, config, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_hsdp import (
    GatherPolicy,
    HSDPInferenceConfig,
    apply_hsdp_to_model,
    choose_policy,
    gathered,
    handle_of,
    hsdp_report,
    is_transformer_block_module,
    load_hsdp_model,
    release,
    remove_hsdp,
)
from omni_hsdp.conditions import find_blocks, matches
from omni_hsdp.placement import placement_of
from omni_parallel_state import ParallelLayout, ParallelState


def refuse(model, settings, **options):
    with sharing(1), pytest.raises(ParallelConfigError) as caught:
        apply_hsdp_to_model(model, settings, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_not_enabled(tmp_path):
    assert "enabled=True" in refuse(toy(), HSDPInferenceConfig())
    with sharing(1), pytest.raises(ParallelConfigError, match="enabled=True"):
        load_hsdp_model(Toy, tmp_path, HSDPInferenceConfig())


@pytest.mark.parametrize(("replicate", "shard"), [(0, -1), (1, 0), (1, -2), (1, 1.0), (True, 1)])
def test_sizes_that_are_none(replicate, shard):
    assert "legal" in refuse(toy(), HSDPInferenceConfig(True, replicate, shard))


def wrong_sizes(pairs):
    model, found = toy(), []
    for layout in (ParallelLayout(ulysses=4), ParallelLayout(fs=2, replicate=2)):
        state = ParallelState(layout)
        with state.use():
            for replicate, shard in pairs:
                try:
                    apply_hsdp_to_model(model, config(shard, replicate))
                except ParallelConfigError as error:
                    found.append(str(error))
        state.destroy()
    return found[: len(pairs)], found[len(pairs) :]


def test_sizes_that_do_not_multiply_to_the_world(ranks):
    pairs = [(1, 3), (3, -1), (2, 4), (4, 4), (1, 1)]
    for found in ranks.run(wrong_sizes, pairs, world_size=4):
        for messages, legal in zip(found, ("1 × 4, 2 × 2, 4 × 1", "2 × 2, or"), strict=True):
            assert len(messages) == len(pairs)
            for message in messages:
                assert f"legal here (replicate × shard): {legal}" in message


def over(layout, reason):
    state = ParallelState(layout)
    with state.use(), pytest.raises(ParallelConfigError, match=f"{reason}.*put fs="):
        apply_hsdp_to_model(toy(), config())
    state.destroy()


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (ParallelLayout(pp=2, ulysses=2), r"pp=2.*different weights"),
        (ParallelLayout(dp=2, ulysses=2), r"dp=2.*unequally often"),
    ],
    ids=["pp", "dp"],
)
def test_ranks_that_differ_cannot_share_weights(ranks, layout, reason):
    ranks.run(over, layout, reason, world_size=4)


def sizes_of(layout, settings):
    state = ParallelState(layout)
    placement = placement_of(settings, state, None)
    state.destroy()
    return placement.replicate, placement.shard


@pytest.mark.parametrize(
    ("layout", "settings", "sizes"),
    [
        (ParallelLayout(dp=2, ulysses=2, fs=2), config(), (1, 2)),
        (ParallelLayout(fs=2, replicate=2), config(), (2, 2)),
        (ParallelLayout(fs=2, replicate=2), config(-1, 2), (2, 2)),
        (ParallelLayout(ulysses=4), config(), (1, 4)),
        (ParallelLayout(ulysses=4), config(-1, 2), (2, 2)),
    ],
)
def test_a_size_that_is_left_open_is_that_of_the_layout(ranks, layout, settings, sizes):
    assert ranks.run(sizes_of, layout, settings, world_size=4) == [sizes] * 4


def part_of_another(keep):
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config(), policy=GatherPolicy(keep=keep))
        model(seeded(2, 6))
        for part in (model.blocks[0], model.blocks[0].up, model.stem):
            with pytest.raises(ParallelConfigError, match="part of a model that is sharded"):
                apply_hsdp_to_model(nn.ModuleList([part])[0], config(), conditions="*")


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_part_of_a_sharded_model(ranks, keep):
    ranks.run(part_of_another, keep, world_size=2)


def test_one_rank_has_no_shares_for_the_host():
    message = refuse(toy(), config(), policy=GatherPolicy(cpu_offload=True))
    assert "cpu_offload=True" in message
    assert "hsdp_shard_size of 2" in message


@pytest.mark.parametrize("name", ["param_dtype", "output_dtype"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bfloat16"])
def test_dtypes_that_nothing_can_be_cast_to(name, dtype):
    message = refuse(toy(), config(**{name: dtype}))
    assert name in message
    assert "torch.bfloat16" in message


def twice():
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config())
        outer = nn.Sequential(model, nn.Linear(5, 5))
        for target in (model, outer):
            with pytest.raises(ParallelConfigError, match=r"already.*remove_hsdp"):
                apply_hsdp_to_model(target, config())
        remove_hsdp(model)
        with pytest.raises(ParallelConfigError, match="not sharded"):
            remove_hsdp(model)
        torch.distributed.fsdp.fully_shard(model.blocks[0], mesh=None)
        with pytest.raises(ParallelConfigError, match="distributed already"):
            apply_hsdp_to_model(model, config())


def test_applied_twice(ranks):
    ranks.run(twice, world_size=2)


def test_weights_that_are_not_there_yet():
    message = refuse(toy().to("meta"), config())
    assert "stem.weight has no values" in message
    model = toy()
    model.head = nn.LazyLinear(3)
    assert "head.weight has no values" in refuse(model, config())


def shard_that_fails():
    import torch.distributed.distributed_c10d as c10d
    from torch.distributed import fsdp

    def fails(*args, **kwargs):
        raise ArithmeticError

    state = ParallelState(ParallelLayout(ulysses=2))
    before = len(c10d._world.pg_map)
    with state.use(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "fully_shard", fails)
        with pytest.raises(ArithmeticError):
            apply_hsdp_to_model(toy(), config())
    return len(c10d._world.pg_map) - before


def test_groups_of_a_model_that_could_not_be_sharded_are_destroyed(ranks):
    assert ranks.run(shard_that_fails, world_size=2) == [0, 0]


def test_nothing_matches():
    message = refuse(toy(), config(), conditions="layers.*")
    assert "'layers.*'" in message
    assert "blocks.*" in message
    assert "stem, head" in refuse(Flat(), config())


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


def test_a_list_is_no_block():
    assert "'blocks.*'" in refuse(toy(), config(), conditions="blocks")
    assert "'blocks.*'" in refuse(toy(), config(), conditions="**")


def test_a_condition_that_is_none():
    assert "callable" in refuse(toy(), config(), conditions=[3])


ACTS = (release, remove_hsdp, hsdp_report, choose_policy, handle_of)


@pytest.mark.parametrize("act", [*ACTS, lambda model: gathered(model).__enter__()])
def test_what_is_not_sharded(act):
    with pytest.raises(ParallelConfigError, match="not sharded"):
        act(toy())


def test_no_state_is_current():
    with pytest.raises(ParallelError, match="no parallel state"):
        apply_hsdp_to_model(toy(), config())


def in_use():
    with sharing(2):
        model = apply_hsdp_to_model(toy(), config())
        handle = handle_of(model)
        with gathered(model), pytest.raises(ParallelError, match="gathered"):
            handle.remove()
        cls = type(model)
        model.__class__ = type("Other", (cls,), {})
        with pytest.raises(ParallelError, match="another class"):
            handle.remove()
        model.__class__ = cls
        handle.remove()
        return type(model) is Toy


def test_removal_while_it_cannot_be_leaves_the_handle_good(ranks):
    assert ranks.run(in_use, world_size=2) == [True, True]


# -- conditions ------------------------------------------------------------------------------


def test_block_names():
    names = ("transformer_blocks.3", "single_transformer_blocks.0", "a.transformer_blocks.11")
    assert all(is_transformer_block_module(name, None) for name in names)
    others = ("transformer_blocks", "transformer_blocks.3.attn", "blocks.3", "transformer_blocks.x")
    assert not any(is_transformer_block_module(name, None) for name in others)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("blocks.*", "blocks.0", True),
        ("blocks.*", "blocks.0.up", False),
        ("*.up", "blocks.0.up", False),
        ("**.up", "blocks.0.up", True),
        ("blocks.1*", "blocks.12", True),
        ("blocks.1", "blocks_1", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_conditions_come_from_the_argument_then_the_model_then_what_repeats():
    model = toy()
    assert [name for name, _ in find_blocks(model)] == ["blocks.0", "blocks.1", "blocks.2"]
    model._hsdp_shard_conditions = [lambda name, module: name.endswith(".1"), "head"]
    assert [name for name, _ in find_blocks(model)] == ["blocks.1", "head"]
    both = find_blocks(model, ["stem", lambda name, module: isinstance(module, Toy)])
    assert [name for name, _ in both] == ["stem"]


def test_lists_that_mix_classes_hold_blocks():
    model = toy()
    model.blocks.append(nn.Sequential(nn.Linear(6, 6)))
    assert [name for name, _ in find_blocks(model)] == [f"blocks.{i}" for i in range(4)]
    nested = nn.ModuleList([nn.ModuleList([toy().blocks[0]]), toy().blocks[1]])
    assert [name for name, _ in find_blocks(nn.ModuleDict({"down": nested}))] == ["down.0.0"]
