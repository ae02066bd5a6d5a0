"""Models that are sharded, called in every way, and given back."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_sharded import config, differences, equal, seeded, sharing, snapshot, toy

from omni_hsdp import (
    GatherPolicy,
    HSDPInferenceConfig,
    apply_hsdp_to_model,
    gathered,
    handle_of,
    hsdp_report,
    remove_hsdp,
)
from omni_parallel_state import Handle, ParallelLayout, ParallelState

SHAPES = {"2": (2, 1), "4": (4, 1), "2 x 2": (2, 2)}


def shard_and_remove(shard, replicate):
    model, x = toy(), seeded(2, 6)
    with sharing(shard, replicate):
        expected, before = model(x), snapshot(model)
        held = apply_hsdp_to_model(model, config(shard, replicate))
        same = held is model and all(isinstance(p, DTensor) for p in model.parameters())
        same &= type(model).__name__ == "Toy" and type(model.blocks[0]).__name__ == "Block"
        found = [model(x), model(x)]
        remove_hsdp(model)
        rest = differences(before, snapshot(model))
        again = apply_hsdp_to_model(model, config(shard, replicate))
        found.append(again(x))
        with handle_of(model) as handle:
            assert isinstance(handle, Handle)
        handle.remove()
        return same, [equal(o, expected) for o in found], rest, differences(before, snapshot(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_removal_gives_the_model_back_and_it_can_be_sharded_again(ranks, shape):
    shard, replicate = SHAPES[shape]
    size = shard * replicate
    for found in ranks.run(shard_and_remove, shard, replicate, world_size=size):
        assert found == (True, [True] * 3, [], [])


def in_mode(mode):
    x = seeded(2, 6)
    state = ParallelState(ParallelLayout(fs=2))
    built = toy()
    expected = built(x).detach()
    with mode():
        apply_hsdp_to_model(built, config(), state=state)
        inside = torch.equal(built(x), expected)
    with torch.no_grad():
        outside = torch.equal(built(x), expected)
    outside &= torch.equal(built(x), expected)
    with torch.inference_mode(), gathered(built):
        inside &= torch.equal(built(x), expected)
    with torch.no_grad():
        outside &= torch.equal(built(x), expected)
    remove_hsdp(built)
    return inside, outside, built(x).requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_every_mode_of_autograd(ranks, mode):
    assert ranks.run(in_mode, mode, world_size=2) == [(True, True, True)] * 2


def offloaded():
    model, x = toy(), seeded(2, 6)
    with sharing(2):
        expected, before = model(x), snapshot(model)
        apply_hsdp_to_model(model, config(), policy=GatherPolicy(cpu_offload=True))
        found = [torch.equal(model(x), expected) for _ in range(2)]
        with gathered(model, write=True):
            model.blocks[0].up.weight.data += 0
            found.append(torch.equal(model(x), expected))
        found.append(torch.equal(model(x), expected))
        remove_hsdp(model)
        return found, differences(before, snapshot(model))


def test_shares_in_host_memory(ranks):
    assert ranks.run(offloaded, world_size=2) == [([True] * 4, [])] * 2


def left_in_memory():
    model, x = toy(), seeded(2, 6)
    gc.disable()  # or it may have come by itself
    try:
        with sharing(2):
            apply_hsdp_to_model(model, config())(x)
            shares = [ref(parameter) for parameter in model.parameters()]
            remove_hsdp(model)
            return sum(share() is not None for share in shares), len(shares)
    finally:
        gc.enable()


def test_shares_are_freed_when_the_whole_model_is_given_back(ranks):
    for left, shares in ranks.run(left_in_memory, world_size=2):
        assert shares > 0
        assert left == 0


def built_in_inference_mode():
    x = seeded(2, 6)
    state = ParallelState(ParallelLayout(fs=2))
    with torch.inference_mode():
        model = toy()
        expected = model(x)
        apply_hsdp_to_model(model, config(), state=state)
        found = [torch.equal(model(x), expected)]
        remove_hsdp(model)
        found.append(torch.equal(model(x), expected))
    with torch.no_grad():
        found.append(torch.equal(model(x), expected))
    return found


def test_a_model_that_was_built_in_inference_mode(ranks):
    assert ranks.run(built_in_inference_mode, world_size=2) == [[True] * 3] * 2


def compiled():
    model, x = toy(), seeded(2, 6)
    with sharing(2):
        expected = model(x)
        apply_hsdp_to_model(model, config())
        for block in model.blocks:
            block.compile(backend="eager")
        return [torch.equal(model(x), expected) for _ in range(3)]


def test_compiled_blocks(ranks):
    assert ranks.run(compiled, world_size=2) == [[True] * 3] * 2


class Fails(nn.Module):
    """Raises in one call."""

    raises: type[BaseException] | None = None

    def forward(self, x):
        if self.raises is not None:
            raise self.raises
        return x


def call_that_fails(error, policy):
    model, x = toy(), seeded(2, 6)
    trap = model.blocks[1].trap = Fails()
    trap.raises = None
    model.blocks[1].register_forward_hook(lambda module, args, output: trap(output))
    found, resets, reset = [], [], FSDPModule.reset_iter_state

    def noted(module):
        resets.append(type(module).__name__)
        reset(module)

    def fail():
        trap.raises = error
        with pytest.raises(error):
            model(x)
        trap.raises = None

    with sharing(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPModule, "reset_iter_state", noted)
        expected, before = model(x), snapshot(model)
        apply_hsdp_to_model(model, config(), policy=policy)
        for context in (nullcontext, lambda: gathered(model)):
            with context():
                fail()
                given_up = all(isinstance(p, DTensor) for p in model.parameters())
                found.append(given_up or error is KeyboardInterrupt)
                found.append(torch.equal(model(x), expected))
            found.append(torch.equal(model(x), expected))
        fail()
        remove_hsdp(model)
        found.append(torch.equal(model(x), expected))
        return found, resets, differences(before, snapshot(model))


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("keep", ["none", "last", "all"])
def test_the_next_call_after_one_that_raised(ranks, error, keep):
    policy = GatherPolicy(keep=keep)
    for found, resets, rest in ranks.run(call_that_fails, error, policy, world_size=2):
        assert found == [True] * 7
        assert resets == ["Toy"] * 3
        assert rest == []


def on_meshes():
    x = seeded(2, 6)
    found = []
    for shape in ((4,), (2, 2)):
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        model = toy()
        with torch.no_grad():
            expected = model(x)
            replicate = shape[0] if len(shape) == 2 else 1
            apply_hsdp_to_model(model, config(replicate=replicate), mesh=mesh)
            found += [torch.equal(model(x), expected), hsdp_report(model).shard]
            remove_hsdp(model)
            found.append(torch.equal(model(x), expected))
    return found


def test_a_mesh_of_ones_own(ranks):
    assert ranks.run(on_meshes, world_size=4) == [[True, 4, True, True, 2, True]] * 4


def in_layout(**degrees):
    """The rest of the world is resolved, whatever else its ranks do."""
    x, found = seeded(2, 6), []
    state = ParallelState(ParallelLayout(**degrees))
    with state.use(), torch.no_grad():
        for settings in (HSDPInferenceConfig(True), config(2, 2), config(4)):
            settings.param_dtype = None
            model = toy()
            expected = model(x)
            apply_hsdp_to_model(model, settings)
            report = hsdp_report(model)
            found.append((report.replicate, report.shard, torch.equal(model(x), expected)))
            remove_hsdp(model)
    state.destroy()
    return found


@pytest.mark.parametrize("degrees", [{"ulysses": 4}, {"cfg": 2, "ring": 2}])
def test_the_shard_size_is_resolved_to_the_world_over_the_replicate_size(ranks, degrees):
    for found in ranks.run(in_layout, world_size=4, **degrees):
        assert found == [(1, 4, True), (2, 2, True), (1, 4, True)]


def test_one_rank_leaves_the_model_alone():
    model = toy()
    before = snapshot(model)
    with sharing(1):
        apply_hsdp_to_model(model, config())
        with gathered(model, write=True):
            pass
        assert hsdp_report(model).per_rank == (hsdp_report(model).total,)
        remove_hsdp(model)
    assert differences(before, snapshot(model)) == []


def output_dtype():
    model, x = toy(), seeded(2, 6)
    with sharing(2):
        expected = model(x)
        apply_hsdp_to_model(model, config(output_dtype=torch.float64))
        return torch.equal(model(x), expected.double())


def test_outputs_are_cast_at_the_end_only(ranks):
    assert ranks.run(output_dtype, world_size=2) == [True, True]


def reports():
    with sharing(4):
        model = apply_hsdp_to_model(toy(), config(), ignored_modules=["head"])
        report = hsdp_report(model)
        mine = sum(
            (p.to_local() if isinstance(p, DTensor) else p).numel() * 4 for p in model.parameters()
        )
        return report, mine


def test_the_report_counts_what_each_rank_holds(ranks):
    found = ranks.run(reports, world_size=4)
    report = found[0][0]
    assert all(other == report for other, _ in found)
    assert report.per_rank == tuple(mine for _, mine in found)
    total = sum(p.numel() * 4 for p in toy().parameters())
    assert report.total == total
    block = sum(p.numel() * 4 for p in toy().blocks[0].parameters())
    assert report.blocks == {"": 42 * 4} | {f"blocks.{n}": block for n in range(3)}
    assert report.gathered_peak == 42 * 4 + 2 * block
    for text in ("shared by 4 ranks", "head.bias: 20 bytes, in the ignored module 'head'"):
        assert text in str(report)
