"""All-to-all of attention, forward and backward, against slices of the whole tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from group_cases import Guarded, everyone, raised, same, seeded
from torch import Tensor

from omni_group_coordinator import (
    GroupCoordinator,
    ParallelConfigError,
    ParallelError,
    SeqAllToAll4D,
    SeqAllToAll5D,
    all_to_all_4D,
    all_to_all_5D,
    comm,
    halo_exchange,
    record_traffic,
)
from rank_harness import RankPool

worlds = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
FORMS: list[tuple[Callable[..., Tensor], int]] = [
    (all_to_all_4D, 2),
    (all_to_all_5D, 3),
]


def shape_for(size: int, heads_dim: int) -> list[int]:
    shape = [2, 3 * size, 2 * size, 5]
    return shape if heads_dim == 2 else [*shape[:2], 3, *shape[2:]]


def there_and_back() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    for exchange, heads in FORMS:
        whole = seeded(1, *shape_for(size, heads))
        shard = whole.chunk(size, 1)[rank]
        with record_traffic() as traffic:
            out = exchange(shard, heads, 1, group)
            back = exchange(out, 1, heads, group, use_sync=True)
        same(out, whole.chunk(size, heads)[rank])
        same(back, shard)
        # (P - 1) / P of the tensor, and nothing for a group of one rank.
        sent = shard.numel() * 4 * (size - 1) // size
        assert traffic.total_bytes == 2 * sent
        assert traffic.total_calls == (2 if size > 1 else 0)
        same(exchange(shard, group=group), out)


@worlds
def test_sequence_shards_become_head_shards_and_back(ranks: RankPool, world_size: int):
    ranks.run(there_and_back, world_size=world_size)


def uneven_counts() -> None:
    group = everyone()
    rank = group.rank_in_group
    tokens, counts = [4, 0, 3], [1, 2, 2]
    for exchange, heads in FORMS:
        shape = shape_for(1, heads)
        shape[1], shape[heads] = sum(tokens), sum(counts)
        whole = seeded(2, *shape)
        shard = whole.split(tokens, 1)[rank]
        lengths = {"seq_lengths": tokens, "head_counts": counts}
        with record_traffic() as traffic:
            out = exchange(shard, heads, 1, group, **lengths)
        same(out, whole.split(counts, heads)[rank])
        assert traffic.total_bytes == 4 * (shard.numel() // 5) * (5 - counts[rank])
        same(exchange(out, 1, heads, group, **lengths), shard)


def test_shards_of_unequal_tokens_and_heads_are_exchanged(ranks: RankPool):
    ranks.run(uneven_counts, world_size=3)


def strided_halves() -> None:
    group = everyone()
    whole = seeded(3, 2, 6, 4, 5)
    shard = Guarded(whole.chunk(2, 1)[group.rank])
    same(all_to_all_4D(shard.tensor, group=group), whole.chunk(2, 2)[group.rank])
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        low = whole.to(dtype)
        out = all_to_all_4D(low.chunk(2, 1)[group.rank], group=group)
        same(out, low.chunk(2, 2)[group.rank])
    same(all_to_all_4D(whole.chunk(2, 1)[group.rank]), whole.chunk(2, 2)[group.rank])
    over = dist.group.WORLD
    same(all_to_all_4D(whole.chunk(2, 1)[group.rank], group=over), whole.chunk(2, 2)[group.rank])


def test_strided_and_low_precision_shards_are_exchanged_over_any_group(ranks: RankPool):
    ranks.run(strided_halves)


def gradients() -> None:
    """Each rank weighs its heads; the gradient of its shard is that of the whole tensor."""
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    forms: list[tuple[Any, int]] = [(SeqAllToAll4D, 2), (SeqAllToAll5D, 3)]
    for form, heads in forms:
        for scatter, gather in ((heads, 1), (1, heads)):
            whole = seeded(4, *shape_for(size, heads)).requires_grad_()
            weight = seeded(5, *whole.shape)
            (whole.sin() * weight).sum().backward()
            assert whole.grad is not None
            shard = whole.detach().chunk(size, gather)[rank].clone().requires_grad_()
            out = form.apply(group, shard, scatter, gather)
            same(out, whole.detach().chunk(size, scatter)[rank])
            with record_traffic() as traffic:
                (out.sin() * weight.chunk(size, scatter)[rank]).sum().backward()
            assert shard.grad is not None
            same(shard.grad, whole.grad.chunk(size, gather)[rank])
            assert traffic.total_bytes == shard.numel() * 4 * (size - 1) // size


@worlds
def test_the_backward_gives_the_gradients_of_the_single_process(ranks: RankPool, world_size: int):
    ranks.run(gradients, world_size=world_size)


def uneven_gradients() -> None:
    group = everyone()
    rank = group.rank_in_group
    tokens, counts = [4, 0, 3], [1, 2, 2]
    whole = seeded(6, 2, 7, 5, 2).requires_grad_()
    weight = seeded(7, 2, 7, 5, 2)
    (whole.square() * weight).sum().backward()
    assert whole.grad is not None
    shard = whole.detach().split(tokens, 1)[rank].clone().requires_grad_()
    out: Any = SeqAllToAll4D.apply(group, shard, 2, 1, False, tokens, counts)
    (out.square() * weight.split(counts, 2)[rank]).sum().backward()
    assert shard.grad is not None
    same(shard.grad, whole.grad.split(tokens, 1)[rank])


def test_the_backward_takes_uneven_lengths_back(ranks: RankPool):
    ranks.run(uneven_gradients, world_size=3)


def check_gradients() -> None:
    group = everyone()
    shard = seeded(group.rank, 1, 2, 2, 2, dtype=torch.float64).requires_grad_()

    def exchange_twice(tensor: Tensor) -> Any:
        out: Any = SeqAllToAll4D.apply(group, tensor, 2, 1)
        return SeqAllToAll4D.apply(group, out.square(), 1, 2)

    assert torch.autograd.gradcheck(exchange_twice, (shard,))


def test_gradcheck_accepts_the_exchange(ranks: RankPool):
    ranks.run(check_gradients)


REFUSED: list[tuple[Callable[[GroupCoordinator | None], object], str]] = [
    (lambda g: all_to_all_4D(seeded(1, 2, 3, 4), group=g), "takes a tensor of 4 dimensions; got"),
    (lambda g: all_to_all_5D(seeded(1, 2, 3, 4, 1), group=g), "takes a tensor of 5 dimensions"),
    (
        lambda g: all_to_all_4D(seeded(1, 1, 4, 4, 2), 3, 1, g),
        "scatter_idx=3 and gather_idx=1; legal: (2, 1) to exchange sequence shards for head "
        "shards, (1, 2) for the way back",
    ),
    (lambda g: all_to_all_4D(seeded(1, 1, 4, 4, 2), 2, 2, g), "scatter_idx=2 and gather_idx=2"),
    (lambda g: all_to_all_5D(seeded(1, 1, 4, 3, 4, 2), 2, 1, g), "legal: (3, 1)"),
    (lambda g: all_to_all_5D(seeded(1, 1, 4, 2, 4, 2), group=g), "dimension 2, of size 3; got"),
]
INDIVISIBLE: list[tuple[Callable[[GroupCoordinator], object], str]] = [
    (lambda g: all_to_all_4D(seeded(1, 1, 4, 3, 2), group=g), "nearest lengths that can: 2 and 4"),
    (lambda g: all_to_all_4D(seeded(1, 1, 5, 4, 2), 1, 2, g), "cannot be split evenly over the 2"),
    (
        lambda g: all_to_all_4D(seeded(1, 1, 4, 3, 2), group=g, head_counts=[1, 1]),
        "add up to 2, but dimension 2",
    ),
]


def refuse() -> None:
    group = everyone()
    for call, expected in [*REFUSED, *(INDIVISIBLE if group.world_size > 1 else [])]:
        assert expected in raised(lambda: call(group), ParallelConfigError)  # noqa: B023


@pytest.mark.parametrize("world_size", [1, 2])
def test_shapes_and_dimensions_that_cannot_be_are_refused(ranks: RankPool, world_size: int):
    ranks.run(refuse, world_size=world_size)


def test_a_group_of_one_rank_needs_no_process_group():
    alone = GroupCoordinator([[0]], 0, "gloo")
    mine = seeded(1, 2, 3, 4, 5).requires_grad_()
    assert all_to_all_4D(mine, group=alone) is mine
    out: Any = SeqAllToAll4D.apply(alone, mine)
    out.sum().backward()
    assert mine.grad is not None
    same(mine.grad, torch.ones_like(mine))
    first, last = halo_exchange(mine.detach(), 1, 2, 2, alone)
    same(first, torch.empty(2, 0, 4, 5))
    same(last, torch.empty(2, 0, 4, 5))
    with pytest.raises(ParallelConfigError, match="a halo of -1 rows"):
        halo_exchange(mine, 1, -1, 0, alone)
    with pytest.raises(ParallelConfigError, match="dim=4 does not exist"):
        halo_exchange(mine, 4, 1, 0, alone)


def test_without_a_group_and_without_a_default_group_the_error_says_what_to_call():
    assert not dist.is_initialized()
    with pytest.raises(ParallelError, match="init_distributed_environment"):
        all_to_all_4D(seeded(1, 2, 3, 4, 5))


def test_use_sync_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(comm, "checked_group_of", lambda group: group)
    monkeypatch.setattr(comm.collectives, "all_to_all", lambda group, tensor, *_: tensor)
    mine = torch.empty(2, 3, 4, 5, device="meta")
    for group in ("a stand-in",):
        all_to_all_4D(mine, group=group)  # type: ignore[arg-type]
        assert waited == []
        all_to_all_4D(mine, group=group, use_sync=True)  # type: ignore[arg-type]
        assert waited == [torch.device("meta")]
