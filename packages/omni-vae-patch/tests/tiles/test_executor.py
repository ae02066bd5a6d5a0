"""Split, execute, merge on several ranks, with operators of the tests' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from operators import pieces_of, world_group
from torch import Tensor

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    record_traffic,
)
from omni_parallel_state import ParallelLayout, ParallelState
from omni_vae_patch.autoencoders import (
    DistributedVaeExecutor,
    DistributedVaeMixin,
    GridSpec,
)
from omni_vae_patch.tiles.balance import balanced_owners


def doubled_with_a_dimension(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x]).repeat_interleave(2, dim=-1)


OPERATIONS = {
    "more dimensions": (doubled_with_a_dimension, torch.float32),
    "fewer dimensions": (lambda x: x.sum(0), torch.float64),
    "another dtype": (lambda x: x > 0, torch.bfloat16),
    "integers": (lambda x: x + 1, torch.int64),
}


@pytest.mark.parametrize("lengths", [[5, 1, 3, 3, 2], [7], [4, 3]])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_any_shape_and_dtype_and_any_number_of_tiles(
    ranks: Any, kind: str, lengths: list[int]
) -> None:
    def execute() -> tuple[bool, tuple[int, ...]]:
        work, dtype = OPERATIONS[kind]
        z = (10 * torch.randn(3, 4, sum(lengths), generator=torch.Generator().manual_seed(1))).to(
            dtype
        )
        expected = torch.cat([work(part) for part in torch.split(z, lengths, -1)], -1)
        executor = DistributedVaeExecutor(world_group())
        operator = pieces_of(lengths, work)
        equal = [torch.equal(executor.execute(z, operator), expected) for _ in range(2)]
        alone = executor.execute(z, operator, broadcast_result=False)
        if dist.get_rank() == 0:
            equal.append(torch.equal(alone, expected))
        return all(equal), tuple(alone.shape) if dist.get_rank() else ()

    found = ranks.run(execute, world_size=3)
    assert found == [(True, ()), (True, (0,)), (True, (0,))]


def test_output_dtype_is_what_is_merged(ranks: Any) -> None:
    def execute() -> tuple[torch.dtype, int]:
        executor = DistributedVaeExecutor(world_group())
        with record_traffic() as traffic:
            operator = pieces_of([4, 4], lambda x: x, dtype=torch.float16)
            result = executor.execute(torch.ones(2, 8), operator, broadcast_result=False)
        return result.dtype, traffic.bytes_sent["tiles"]

    assert ranks.run(execute) == [(torch.float16, 0), (torch.float32, 2 * 4 * 2)]


def test_fewer_ranks_than_the_group_compute(ranks: Any) -> None:
    def execute(size: int) -> tuple[bool, int]:
        executor = DistributedVaeExecutor(world_group())
        executor.set_parallel_size(size)
        done: list[int] = []

        def work(x: Tensor) -> Tensor:
            done.append(1)
            return x + 1

        z = torch.arange(12.0).reshape(2, 6)
        result = executor.execute(z, pieces_of([2, 2, 1, 1], work))
        return torch.equal(result, z + 1), len(done)

    assert ranks.run(execute, 2, world_size=3) == [(True, 2), (True, 2), (True, 0)]
    assert ranks.run(execute, 1, world_size=3) == [(True, 4), (True, 0), (True, 0)]


@pytest.mark.parametrize("size", [0, -1, 4, 2.5, "2"])
def test_sizes_that_do_not_fit_are_refused(ranks: Any, size: Any) -> None:
    def refused() -> str:
        executor = DistributedVaeExecutor(world_group())
        with pytest.raises(ParallelConfigError, match="legal here: 1 to 3") as caught:
            executor.set_parallel_size(size)
        with pytest.raises(ParallelConfigError, match="'tile'"):
            executor.set_parallel_size(2, mode="spatial_shard")
        return str(caught.value)

    assert all(f"parallel_size={size!r}" in text for text in ranks.run(refused, world_size=3))


def test_the_longest_first() -> None:
    assert balanced_owners([1, 1, 1, 3], 2) == [1, 1, 1, 0]
    assert balanced_owners([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert balanced_owners([1.0, 1.0], 3) == [0, 1]
    assert balanced_owners([], 2) == []


def test_exact_sizes_once_and_no_sizes_after_the_first_time(ranks: Any) -> None:
    def execute() -> tuple[dict[str, int], dict[str, int]]:
        executor = DistributedVaeExecutor(world_group())
        operator = pieces_of([5, 2, 1], doubled_with_a_dimension)
        z = torch.randn(3, 8)
        executor.execute(z, operator, broadcast_result=False)
        with record_traffic() as traffic:
            executor.execute(z, operator, broadcast_result=False)
        return dict(traffic.bytes_sent), dict(traffic.calls)

    first, second, third = ranks.run(execute, world_size=3)
    for one in (first, second, third):
        assert one[1] == {"all_reduce": 2, "tiles": 1}
    assert first[0]["tiles"] == 0
    # Rank 0 has the tile of 5, the others send what they made of 2 and of 1.
    assert second[0]["tiles"] == 2 * 3 * (2 * 2) * 4
    assert third[0]["tiles"] == 2 * 3 * (1 * 2) * 4


def test_a_result_that_changes_its_shape_is_told_anew(ranks: Any) -> None:
    def execute() -> list[bool]:
        executor = DistributedVaeExecutor(world_group())
        equal = []
        for times in (1, 3, 3, 2):
            z = torch.randn(2, 5, generator=torch.Generator().manual_seed(times))
            operator = pieces_of([3, 2], lambda x, n=times: x.repeat(n, 1))
            equal.append(torch.equal(executor.execute(z, operator), z.repeat(times, 1)))
        return equal

    assert ranks.run(execute) == [[True] * 4] * 2


def test_strides_travel_too(ranks: Any) -> None:
    def execute() -> tuple[Any, ...]:
        executor = DistributedVaeExecutor(world_group())
        seen: list[tuple[int, ...]] = []
        z = torch.randn(1, 3, 4, 6)
        operator = pieces_of([3, 3], lambda x: x.contiguous(memory_format=torch.channels_last))
        merge = operator.merge

        def watching(found: dict[tuple[int, ...], Tensor], spec: GridSpec) -> Tensor:
            seen.extend(tile.stride() for tile in found.values())
            return merge(found, spec)

        operator.merge = watching
        assert torch.equal(executor.execute(z, operator), z)
        return tuple(seen)

    assert ranks.run(execute) == [((36, 1, 9, 3),) * 2, ()]


# -- where it gets its group ---------------------------------------------------------------


def test_the_group_is_that_of_the_current_state(ranks: Any) -> None:
    def execute() -> tuple[list[int], bool]:
        state = ParallelState(ParallelLayout(dp=4, vae=2))
        with state.use():
            executor = DistributedVaeExecutor()
        z = torch.arange(6.0)[None] + dist.get_rank() // 2
        result = executor.execute(z, pieces_of([3, 2, 1], lambda x: x * 2))
        members = executor.group.ranks
        state.destroy()
        return members, torch.equal(result, z * 2)

    assert ranks.run(execute, world_size=4) == [
        ([0, 1], True),
        ([0, 1], True),
        ([2, 3], True),
        ([2, 3], True),
    ]


def test_a_mixin_is_enabled_by_ranks_and_tiling(ranks: Any) -> None:
    class Autoencoder(DistributedVaeMixin):
        use_tiling = False

    def enabled() -> list[bool]:
        vae = Autoencoder()
        found = [vae.is_distributed_enabled()]
        vae.init_distributed(world_group())
        found.append(vae.is_distributed_enabled())
        vae.use_tiling = True
        found.append(vae.is_distributed_enabled())
        vae.set_parallel_size(1)
        found.append(vae.is_distributed_enabled())
        return found

    assert ranks.run(enabled) == [[False, False, True, False]] * 2


def test_one_rank_needs_no_process_group() -> None:
    executor = DistributedVaeExecutor(GroupCoordinator([[0]], 0, "gloo"))
    z = torch.randn(2, 6)
    assert torch.equal(executor.execute(z, pieces_of([4, 2], lambda x: x + 1)), z + 1)
    with pytest.raises(KeyError):
        executor.execute(z, pieces_of([4, 2], lambda _: {}["planted"]))
