"""Shard and gather are exact inverses, for any length and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from omni_group_coordinator import ParallelConfigError
from omni_parallel_state import ParallelLayout, ParallelState
from omni_sp import (
    ShardingValidator,
    get_sharding_validator,
    sp_gather,
    sp_shard,
    sp_shard_with_padding,
)


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
        assert "has a shard of shape (1, 2), of length 2 along dimension 1" in wrong
        assert "of a whole of length 7 it holds " in wrong


def test_without_a_state_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="initialize_model_parallel"):
        sp_shard(torch.ones(2, 2), 0)


def padded_there_and_back(world_size: int) -> list[int]:
    state = ParallelState(ParallelLayout(ulysses=world_size))
    added = []
    with state.use():
        for length in (9, 10, 1, 8):
            for dim in (0, 1, -1):
                shape = [2, 3, 5]
                shape[dim] = length
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(length))
                shard, padding = sp_shard_with_padding(whole, dim, pad_value=-7.0)
                joined = sp_gather(shard, dim)
                assert torch.equal(joined.narrow(dim, 0, length), whole)
                assert (joined.narrow(dim, length, padding) == -7).all()
            added.append(padding)
        flags, padding = sp_shard_with_padding(torch.ones(5, dtype=torch.bool), 0)
        assert flags.dtype is torch.bool
        assert sp_gather(flags, 0).sum() == 5
    return added


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_padding_is_added_and_cut_along_the_dimension_that_was_split(
    ranks: Any, world_size: int
) -> None:
    expected = [-length % world_size for length in (9, 10, 1, 8)]
    for added in ranks.run(padded_there_and_back, world_size, world_size=world_size):
        assert added == expected


def validated() -> list[str]:
    texts = []
    state = ParallelState(ParallelLayout(ulysses=2))
    whole = torch.arange(12.0).view(2, 6)
    validator = ShardingValidator(state)

    def fails(call: Any) -> None:
        with pytest.raises(ParallelConfigError) as caught:
            call()
        texts.append(str(caught.value))

    fails(validator.validate)
    with validator.track():
        shard = validator.shard(whole, "tokens", 1)
        fails(lambda: validator.shard(whole, "tokens", 0))
        fails(lambda: validator.gather(shard, "tokens", 0))
        fails(lambda: validator.gather(shard[:, 1:], "tokens", 1))
        fails(lambda: validator.gather(shard, "image", 1))
        fails(validator.validate)
        assert torch.equal(validator.gather(shard, "tokens", -1), whole)
        validator.validate()
        fails(lambda: validator.gather(shard, "tokens", 1))
        uneven = validator.shard(whole[:, :5], "tokens", 1, validate_divisible=False)
        assert torch.equal(validator.gather(uneven, "tokens", 1), whole[:, :5])
    validator.validate()
    assert validator.history == [
        "shard 'tokens': (2, 6) along 1 to (2, 3)",
        "gather 'tokens': along 1 to (2, 6)",
        f"shard 'tokens': (2, 5) along 1 to (2, {uneven.shape[1]})",
        "gather 'tokens': along 1 to (2, 5)",
    ]
    with state.use():  # outside of track it only does the work
        silent = get_sharding_validator()
        assert silent is get_sharding_validator()
        assert torch.equal(silent.gather(silent.shard(whole, "x", 1), "x", 1), whole)
        assert not silent.history
    return texts


def test_the_validator_finds_what_does_not_fit(ranks: Any) -> None:
    parts = [
        "nothing was recorded",
        "'tokens' is sharded already, along dimension 1 of shape (2, 6)",
        "was sharded along dimension 1 of shape (2, 6), and is gathered along 0; legal: dim=1",
        "'tokens' has 3 tokens on this rank, and is gathered with a tensor of shape (2, 2)",
        "gather of 'image', which was never sharded; sharded now: tokens",
        "sharded and not gathered: 'tokens' ((2, 6) along dimension 1)",
        "gather of 'tokens', which is gathered already; sharded now: nothing",
    ]
    for texts in ranks.run(validated):
        for text, part in zip(texts, parts, strict=True):
            assert part in text


def renamed() -> list[str]:
    texts = []
    state = ParallelState(ParallelLayout(ulysses=2))
    whole = torch.arange(24.0).view(4, 6)
    validator = ShardingValidator(state)
    with validator.track():
        shard = validator.shard(whole, "tokens", 1)
        for tensor, dim in ((whole, 1), (whole, -1), (shard, 0), (shard, 1)):
            with pytest.raises(ParallelConfigError) as caught:
                validator.shard(tensor, "image", dim, validate_divisible=False)
            texts.append(str(caught.value))
        rows = validator.shard(whole, "rows", 0)  # the same tensor, split in another way
        other = validator.shard(whole.clone(), "other", 1)
        view = validator.shard(whole[:, :4], "view", 1)
        for shards, name, dim in ((rows, "rows", 0), (other, "other", 1), (view, "view", 1)):
            validator.gather(shards, name, dim)
        validator.gather(shard, "tokens", 1)
        again = validator.shard(whole, "image", 1)  # the first is gathered
        assert torch.equal(validator.gather(again, "image", 1), whole)
    validator.validate()
    # Outside of track it only does the work.
    assert validator.shard(validator.shard(whole, "a", 1), "b", 0).shape == (2, 3)
    return texts


def test_the_validator_knows_a_tensor_by_another_name(ranks: Any) -> None:
    for texts in ranks.run(renamed):
        for text in texts[:2]:
            assert "shape (4, 6) that is to be sharded as 'image' is sharded already" in text
            assert "by the name 'tokens' along dimension 1" in text
        for text in texts[2:]:
            assert "sharded as 'image' is this rank's shard already, by the name 'tokens'" in text
