"""Shard and gather are exact inverses, for any length and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import sp_gather, sp_shard


def there_and_back(world_size: int, lengths: list[int]) -> list[int]:
    state = ParallelState(ParallelLayout(ulysses=world_size))
    held = []
    with state.use():
        for length in lengths:
            whole = torch.randn(3, length, 2, generator=torch.Generator().manual_seed(length))
            shard = sp_shard(whole, 1, validate=False)
            held.append(shard.shape[1])
            assert torch.equal(sp_gather(shard, 1, length=length), whole)
    assert torch.equal(sp_shard(whole, 1, validate=False, state=state), shard)
    return held


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_shard_and_gather_are_inverses(ranks: Any, world_size: int) -> None:
    lengths = [9, 10, 1, 5, 24]  # 9 over 8, 10 over 4, shorter than the world, even
    held = ranks.run(there_and_back, world_size, lengths, world_size=world_size)
    for length, parts in zip(lengths, zip(*held, strict=True), strict=True):
        assert sum(parts) == length
        assert max(parts) - min(parts) <= 1


def refused() -> tuple[str, str]:
    with ParallelState(ParallelLayout(ulysses=2)).use():
        with pytest.raises(ParallelConfigError) as uneven:
            sp_shard(torch.ones(1, 5), 1)
        with pytest.raises(ParallelConfigError) as wrong:
            sp_gather(torch.ones(1, 2), 1, length=7)
        with pytest.raises(ParallelConfigError, match="pass length= of the whole"):
            sp_gather(torch.ones(1, 2), 1, validate=False)
        for call in (sp_shard, sp_gather):
            with pytest.raises(ParallelConfigError, match=r"dim=3 does not exist.*-2 to 1"):
                call(torch.ones(1, 2), 3)
    return str(uneven.value), str(wrong.value)


def test_an_uneven_length_is_refused_unless_asked_for(ranks: Any) -> None:
    for uneven, wrong in ranks.run(refused):
        assert "length 5 of dimension 1" in uneven
        assert "nearest lengths that can: 4 and 6" in uneven
        assert "lengths=[4, 3]" in wrong


def test_without_a_state_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        sp_shard(torch.ones(2, 2), 0)
