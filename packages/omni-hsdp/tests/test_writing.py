"""What is changed while weights are gathered is kept on all ranks or on none."""

from __future__ import annotations

import copy

import pytest
import torch.distributed as dist
from torch import nn
from toy_sharded import config, equal, seeded, sharing, toy

from omni_group_coordinator import ParallelConfigError, ParallelError
from omni_hsdp import apply_hsdp_to_model, gathered, remove_hsdp


def change_and_fail(shard, replicate, how, mesh=False):
    """On rank 1 the block fails, or a weight cannot be kept; or a forward fails on all ranks."""
    x = seeded(2, 6)
    with sharing(shard, replicate) as state:
        given = {"mesh": state.mesh(("replicate", "shard"))} if mesh else {}
        expected = toy()(x)
        model = apply_hsdp_to_model(toy(), config(-1 if mesh else shard, replicate), **given)
        try:
            with gathered(model, write=True):
                model.stem.weight.data = model.stem.weight.data * 2
                model.blocks[1].up.weight.mul_(3)
                fail(model, how)
        except (KeyError, ParallelError) as error:
            found = type(error), str(error), equal(model(x), expected)
            with gathered(model, write=True):
                model.head.bias.add_(1)
            remove_hsdp(model)
            changed = toy()
            changed.head.bias.add_(1)
            return *found, equal(model(x), changed(x))


def fail(model, how):
    if how == "forward":
        with pytest.raises(RuntimeError):
            model(seeded(2, 5))
        model(seeded(2, 6))  # gathers what the failure gave up, without the changes
    elif dist.get_rank() == 1 and how == "body":
        raise KeyError(how)
    elif dist.get_rank() == 1:
        weight = model.blocks[2].up.weight
        # What a view begins with is where the weight begins.
        weight.data = weight.data[:1] if how == "view" else seeded(1, 6)


@pytest.mark.parametrize(
    ("shard", "replicate", "mesh"),
    [(2, 1, False), (2, 2, False), (2, 2, True)],
    ids=["2", "2 x 2", "mesh"],
)
@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("body", KeyError, "body"),
        ("shape", ParallelConfigError, "changed its shape"),
        ("view", ParallelConfigError, "changed its shape"),
    ],
)
def test_no_rank_keeps_changes_that_one_cannot(ranks, shard, replicate, mesh, how, error, text):
    found = ranks.run(change_and_fail, shard, replicate, how, mesh, world_size=shard * replicate)
    assert [kind for kind, *_ in found] == [
        error if rank == 1 else ParallelError for rank in range(shard * replicate)
    ]
    for _, message, dropped, works in found:
        assert text in message
        assert dropped
        assert works


def test_changes_that_a_failed_forward_lost_are_an_error(ranks):
    for kind, message, dropped, works in ranks.run(change_and_fail, 2, 1, "forward", world_size=2):
        assert kind is ParallelError
        assert "a forward failed" in message
        assert dropped
        assert works


def transposed():
    """A weight of a square layer becomes another view of where it is gathered."""
    x = seeded(2, 6)
    with sharing(2):
        expected = toy()
        expected.mix = nn.Linear(6, 6)
        expected.mix.weight.data = seeded(6, 6, seed=4)
        model = copy.deepcopy(expected)
        apply_hsdp_to_model(model, config(2))
        with gathered(model, write=True):
            model.mix.weight.data = model.mix.weight.data.t()
        expected.mix.weight.data = expected.mix.weight.data.t().contiguous()
        with gathered(model):
            found = equal(model.mix(x), expected.mix(x))
        remove_hsdp(model)
        return [found, equal(model.mix.weight, expected.mix.weight)]


def test_a_weight_that_became_another_view_is_kept(ranks):
    assert ranks.run(transposed, world_size=2) == [[True] * 2] * 2
