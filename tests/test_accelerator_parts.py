"""What only runs on an accelerator: its kernels, events, pinned memory and copies beside work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omni_parallel
from omni_group_coordinator import ParallelError, halo_exchange, ring_shift
from omni_group_coordinator.coordinator import GroupCoordinator
from omni_hsdp import GatherPolicy, HSDPInferenceConfig, apply_hsdp_to_model, remove_hsdp
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch import VaeParallelConfig, parallelize_vae

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "omni-vae-patch" / "tests"))
from accelerator_ranks import NEEDED, on, run
from stock_autoencoders import CASES as AUTOENCODERS
from stock_autoencoders import decoded, encoded
from stock_pipelines import CASES, picture

pytestmark = [
    NEEDED,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.device == expected.device
    return float((found - expected).abs().max() / expected.abs().max())


# -- autoencoders ------------------------------------------------------------------------------


def autoencoder_errors(device: torch.device, name: str) -> list[float]:
    """Of an image and a latent; of halves of unequal height."""
    case = AUTOENCODERS[name]
    vae = case.build().to(device)
    latent, sample = case.latent(7, 5, 1).to(device), case.sample(7, 5, 2).to(device)
    alone = decoded(vae, latent), encoded(vae, sample)
    state = ParallelState(ParallelLayout.for_world(2, vae=2), device)
    with parallelize_vae(vae, VaeParallelConfig("exact", "height", verify=False), state=state):
        found = [
            (error(decoded(vae, latent), alone[0]), error(encoded(vae, sample), alone[1]))
            for _ in range(2)
        ]
    state.destroy()
    return [value for pair in found for value in pair]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_decode_and_encode_as_one(ranks, name):
    for found in run(ranks, autoencoder_errors, name, world_size=2):
        assert max(found) <= 1e-4


# -- weights -----------------------------------------------------------------------------------

POLICIES = (
    GatherPolicy(prefetch=0),
    GatherPolicy(prefetch=1),
    GatherPolicy(prefetch=2),
    GatherPolicy(keep="last"),
    GatherPolicy(keep="all"),
    GatherPolicy(cpu_offload=True),
    GatherPolicy(prefetch=2, cpu_offload=True),
)


def gathered_by(device: torch.device, policies: tuple[GatherPolicy, ...]) -> dict[str, float]:
    """Errors of a pipeline with weights that are gathered in so many ways."""
    case = CASES["Stable Diffusion 3"]
    pipeline = case.build().to(device)

    def made() -> Tensor:
        return picture(pipeline(**on(device, case.arguments(pipeline))))

    alone, model = made(), pipeline.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = ParallelState(ParallelLayout.for_world(2, fs=2), device)
    config = HSDPInferenceConfig(enabled=True, param_dtype=None)
    found = {}
    for policy in policies:
        apply_hsdp_to_model(model, config, state=state, policy=policy)
        shares = [p.to_local() for p in model.transformer_blocks.parameters()]
        at = torch.device("cpu") if policy.cpu_offload else device
        assert all(share.device == at for share in shares)
        if policy.cpu_offload and device.type != "cpu":
            assert all(share.is_pinned() for share in shares)
        found[str(policy)] = max(error(made(), alone) for _ in range(2))
        with torch.inference_mode():
            found[str(policy)] = max(found[str(policy)], error(made(), alone))
        remove_hsdp(model)
        for name, value in model.state_dict().items():
            assert value.device == device
            assert torch.equal(value, before[name])
    state.destroy()
    return found


def test_gathered_weights_are_those_of_the_whole_model(ranks):
    for found in run(ranks, gathered_by, POLICIES, world_size=2):
        assert max(found.values()) <= 1e-6, found


# -- failures ----------------------------------------------------------------------------------


class BrokenError(Exception):
    """What a block fails with."""


def break_after(model: Any, calls: int) -> Any:
    """Have the last block of a model fail after so many calls."""
    left = [calls]

    def check(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            msg = "this block is broken"
            raise BrokenError(msg)

    return list(model.blocks.children())[-1].register_forward_pre_hook(check)


def fail(device: torch.device, layout: str, calls: int) -> tuple[str, float]:
    """What is told of a block that fails on the second rank, and the error of the next picture."""
    case = CASES["Wan"]
    pipeline = case.build().to(device)
    alone = picture(pipeline(**on(device, case.arguments(pipeline))))
    with omni_parallel.parallelize(pipeline, layout, device=device) as ready:

        def made() -> Tensor:
            return picture(ready(**on(device, case.arguments(pipeline))))

        made()
        hook = break_after(pipeline.transformer, calls) if ready.state.rank == 1 else None
        try:
            made()
            text = "none"
        except (BrokenError, ParallelError) as raised:
            text = str(raised)
        if hook is not None:
            hook.remove()
        return text, error(made(), alone)


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("layout", ["cfg=2", "pp=2"])
def test_a_failure_ends_the_request_on_all_ranks_and_no_later_one(ranks, layout, calls):
    (other, after_other), (own, after) = run(ranks, fail, layout, calls, world_size=2)
    assert own == "this block is broken"
    assert "BrokenError: this block is broken" in other
    assert max(after, after_other) <= 1e-4


# -- groups ------------------------------------------------------------------------------------

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def values(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """The same on every rank, on the CPU."""
    found = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (found % 2 == 0) if dtype is torch.bool else found.to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    """Equal in bits, and on the device."""
    assert found.device.type != "cpu" or not torch.accelerator.is_available()
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    both = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    assert torch.equal(*both)


def strided(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device, with other memory between its rows."""
    padded = torch.cat([tensor, tensor], -1).to(device)
    return padded[..., : tensor.shape[-1]]


def move(group: GroupCoordinator, device: torch.device, dtype: torch.dtype) -> None:
    """Each way of moving values, by values that every rank knows."""
    rank, size = group.rank_in_group, group.world_size
    lengths = [3 + r for r in range(size)]
    pieces = [values(dtype, r, lengths[r], 4) for r in range(size)]
    whole = torch.cat([p.view(torch.uint8) for p in pieces]).view(dtype)
    mine = strided(pieces[rank], device)
    same(group.all_gather(mine, 0, lengths=lengths), whole)
    tops = torch.cat([p[:3].view(torch.uint8) for p in pieces]).view(dtype)
    same(group.all_gather(mine[:3], 0), tops)
    square = values(dtype, 9, sum(lengths), sum(lengths))
    starts = [sum(lengths[:r]) for r in range(size)]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    rows, columns = square[starts[rank] : ends[rank]], square[:, starts[rank] : ends[rank]]
    split = {"scatter_lengths": lengths, "gather_lengths": lengths}
    same(group.all_to_all(strided(rows, device), 1, 0, **split), columns)
    same(group.broadcast(mine.new_empty(3, 4) if rank else pieces[0].to(device)), pieces[0])
    before = pieces[(rank - 1) % size]
    same(ring_shift(mine, group, before.shape), before)
    above, below = halo_exchange(mine, 0, 2, 1, group, lengths)
    same(above, whole[max(0, starts[rank] - 2) : starts[rank]])
    same(below, whole[ends[rank] : ends[rank] + 1])


def send_dicts(group: GroupCoordinator, device: torch.device) -> None:
    """Tensors of both places, and plain data."""
    rank, size = group.rank_in_group, group.world_size
    sent = {"a": values(torch.float32, rank, 5, 3).to(device), "n": rank}
    sent["host"] = values(torch.int64, rank, 4)
    pending = group.isend_tensor_dict(sent, (rank + 1) % size)
    got = group.recv_tensor_dict((rank - 1) % size)
    for work in pending:
        work.wait()
    assert got is not None
    assert got["n"] == (rank - 1) % size
    same(got["a"], values(torch.float32, (rank - 1) % size, 5, 3))
    assert torch.equal(got["host"].cpu(), values(torch.int64, (rank - 1) % size, 4))


def reduce(group: GroupCoordinator, device: torch.device, dtype: torch.dtype) -> None:
    size = group.world_size
    lengths = [2 + r for r in range(size)]
    terms = [values(dtype, r, sum(lengths), 3) % 8 for r in range(size)]
    total = sum(term.to(torch.float64) for term in terms[1:]) + terms[0].to(torch.float64)
    same(group.all_reduce(terms[group.rank_in_group].to(device, copy=True)), total.to(dtype))
    start = sum(lengths[: group.rank_in_group])
    kept = total[start : start + lengths[group.rank_in_group]].to(dtype)
    mine = strided(terms[group.rank_in_group], device)
    same(group.reduce_scatter(mine, 0, lengths=lengths), kept)


def operations(device: torch.device) -> None:
    world_size = torch.distributed.get_world_size()
    state = ParallelState(ParallelLayout(pp=world_size), device)
    for group in (state.world, state.pp):
        for dtype in DTYPES:
            move(group, device, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            reduce(group, device, dtype)
        send_dicts(group, device)
        assert group.all_gather_object(group.rank_in_group) == list(range(world_size))
        group.barrier()
    state.destroy()


@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_move_and_reduce_values(ranks, world_size):
    run(ranks, operations, world_size=world_size)
