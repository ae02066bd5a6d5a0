"""A state's groups as a torch DeviceMesh."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from omni_parallel_state import ParallelConfigError, ParallelError, ParallelLayout, ParallelState

if TYPE_CHECKING:
    from rank_harness import RankPool

TIMEOUT = timedelta(seconds=20)


def mesh_facts(layout: ParallelLayout, dims: tuple[str, ...]) -> tuple[object, ...]:
    state = ParallelState(layout, timeout=TIMEOUT)
    mesh = state.mesh(dims)
    sums = []
    for dim in dims:
        bits = torch.tensor([2**state.rank])
        dist.all_reduce(bits, group=mesh.get_group(dim))
        sums.append(int(bits))
    assert state.mesh(dims) is mesh
    coordinate = mesh.get_coordinate()
    groups = len(dist.distributed_c10d._world.pg_map)
    state.destroy()
    left = len(dist.distributed_c10d._world.pg_map)
    return mesh.mesh.tolist(), mesh.mesh_dim_names, coordinate, sums, groups > left == 1


@pytest.mark.parametrize(
    "dims", [("replicate", "shard"), ("cfg", "ulysses"), ("dp", "sp"), ("sp",)]
)
def test_a_mesh_is_this_ranks_part_of_the_layout(ranks: RankPool, dims: tuple[str, ...]) -> None:
    layout = ParallelLayout(cfg=2, ulysses=2, fs=2, replicate=2)
    for rank, (mesh, names, coordinate, sums, destroyed) in enumerate(
        ranks.run(mesh_facts, layout, dims, world_size=4)
    ):
        shape = [layout.degree(dim) for dim in dims]
        assert mesh == torch.tensor(layout.grid_of(rank, dims)).reshape(shape).tolist()
        assert names == dims
        at = layout.coordinates(rank)
        assert list(coordinate) == [at["fs" if dim == "shard" else dim] for dim in dims]
        assert sums == [sum(2**peer for peer in layout.group_of(rank, dim)) for dim in dims]
        assert destroyed


def one_rank_asks(layout: ParallelLayout) -> list[int]:
    state = ParallelState(layout, timeout=TIMEOUT)
    if state.rank == 1:
        assert state.device_mesh().shape == (1, 2, 1, 1, 2, 1)
    total = int(state.world.all_reduce(torch.ones(1, dtype=torch.int64)))
    later = ParallelState(layout, timeout=TIMEOUT)  # groups are still named alike on all ranks
    total += int(later.sp.all_reduce(torch.ones(1, dtype=torch.int64)))
    return [total]


def test_a_rank_may_make_a_mesh_on_its_own(ranks: RankPool) -> None:
    assert ranks.run(one_rank_asks, ParallelLayout(cfg=2, ulysses=2), world_size=4) == [[6]] * 4


def sharded_output(layout: ParallelLayout, dims: tuple[str, ...]) -> tuple[torch.Tensor, list[int]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).requires_grad_(False)
    state = ParallelState(layout, timeout=TIMEOUT)
    mesh = state.mesh(dims)
    for block in (model[0], model[2]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shard = [p.to_local().numel() for p in model.parameters()]  # type: ignore[attr-defined]
    out = model(torch.linspace(-1, 1, 36).reshape(3, 12))
    state.destroy()
    return out, shard


@pytest.mark.parametrize(
    ("layout", "dims"),
    [
        (ParallelLayout(fs=2), ("shard",)),
        (ParallelLayout(ulysses=2, fs=2), ("replicate", "shard")),
        (ParallelLayout(cfg=2, ulysses=2, fs=4), ("fs",)),
        (ParallelLayout(fs=2, replicate=2), ("replicate", "shard")),
    ],
    ids=["2 shards", "1x2", "4 shards", "2x2"],
)
def test_fully_shard_over_the_mesh_gives_the_output_of_one_rank_bit_for_bit(
    ranks: RankPool, layout: ParallelLayout, dims: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).requires_grad_(False)
    expected = model(torch.linspace(-1, 1, 36).reshape(3, 12))
    sizes = [p.numel() // layout.fs for p in model.parameters()]
    for out, shard in ranks.run(sharded_output, layout, dims, world_size=layout.world_size):
        assert torch.equal(out, expected)
        assert shard == sizes


def test_a_mesh_without_a_process_group_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ParallelError, match="no DeviceMesh without a process group"):
        ParallelState(ParallelLayout()).device_mesh()


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (("dp", "foo"), "unknown dimension 'foo'"),
        (("sp", "ring"), "counts ring twice"),
        (("dp-cfg",), "'dp-cfg' is no dimension of a mesh"),
        (("fs", "shard"), "a dimension twice"),
        ((), "unknown dimension ''"),
    ],
)
def test_a_mesh_over_impossible_dimensions_is_refused(dims: tuple[str, ...], message: str) -> None:
    with pytest.raises(ParallelConfigError, match=message):
        ParallelState(ParallelLayout()).mesh(dims)
