"""Every collective against the same computation in one process."""

import itertools
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
    halo_exchange,
    record_traffic,
    ring_shift,
    split_sizes,
)
from rank_harness import RankPool

MOVED = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX
MIN, PRODUCT = dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT

worlds = pytest.mark.parametrize("world_size", [2, 3, 4])


def uneven(size: int) -> list[int]:
    """Lengths with a zero among them, none like its neighbour."""
    return [3, 0, 4, 1][:size]


def close(actual: object, expected: Tensor) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# -- gathering --------------------------------------------------------------------------------


def gather_everywhere() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    for ndim in (1, 2, 3):
        shape = (3, 5, 2)[:ndim]
        pieces = [seeded(10 * ndim + r, *shape) for r in range(size)]
        for dim in range(-ndim, ndim):
            same(group.all_gather(pieces[rank], dim), torch.cat(pieces, dim))
            listed = group.all_gather(pieces[rank], dim, separate_tensors=True)
            assert isinstance(listed, list)
            for piece, expected in zip(listed, pieces, strict=True):
                same(piece, expected)
            for dst in range(size):
                joined = group.gather(pieces[rank], dst, dim)
                assert (joined is None) == (rank != dst)
                if joined is not None:
                    same(joined, torch.cat(pieces, dim))


@worlds
def test_gathered_pieces_are_those_of_the_whole_along_every_dimension(
    ranks: RankPool, world_size: int
):
    ranks.run(gather_everywhere, world_size=world_size)


def gather_uneven() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    for lengths, dim in itertools.product((uneven(size), split_sizes(7, size)), (0, 1, 2, -1)):
        shape = [2, 3, 2]
        shape[dim] = sum(lengths)
        whole = seeded(3, *shape)
        pieces = whole.split(lengths, dim)
        with record_traffic() as traffic:
            same(group.all_gather(pieces[rank], dim, lengths=lengths), whole)
            listed = group.all_gather(pieces[rank], dim, True, lengths=tuple(lengths))
        own = pieces[rank].numel() * 4
        assert traffic.calls == {"all_gather": 2}  # and no collective for the sizes
        assert traffic.total_bytes == 2 * own * (size - 1)
        for piece, expected in zip(listed, pieces, strict=True):
            same(piece, expected.contiguous())
        with record_traffic() as traffic:
            joined = group.gather(pieces[rank], size - 1, dim, lengths=lengths)
        assert traffic.calls == {"gather": 1}
        assert traffic.total_bytes == (own if rank != size - 1 else 0)
        if rank == size - 1:
            assert joined is not None
            same(joined, whole)


@worlds
def test_uneven_and_empty_pieces_are_gathered_without_asking_for_sizes(
    ranks: RankPool, world_size: int
):
    ranks.run(gather_uneven, world_size=world_size)


def gather_scalars() -> None:
    group = everyone()
    pieces = group.all_gather(torch.tensor(1.5 + group.rank), separate_tensors=True)
    assert [float(piece) for piece in pieces] == [1.5, 2.5, 3.5]
    assert all(piece.shape == () for piece in pieces)


def test_scalars_are_gathered_as_a_list(ranks: RankPool):
    ranks.run(gather_scalars, world_size=3)


def gather_as_on_an_accelerator() -> None:
    """The path of backends other than gloo: one all_gather, of contiguous tensors only."""
    group = everyone()
    assert group.checked is not None
    group.checked.backend = "nccl"
    post = dist.all_gather_single

    def strict(out: Tensor, tensor: Tensor, **options: Any) -> object:
        assert out.is_contiguous()
        assert tensor.is_contiguous()
        return post(out, tensor, **options)

    dist.all_gather_single = strict
    try:
        pieces = [seeded(r, 6, 4) for r in range(3)]
        strided = [piece[::2, 1] for piece in pieces]
        with record_traffic() as traffic:
            same(group.all_gather(pieces[group.rank], 1), torch.cat(pieces, 1))
            same(group.all_gather(strided[group.rank]), torch.cat(strided))
            byte = pieces[group.rank].to(torch.float8_e5m2)
            whole = torch.cat([piece.to(torch.float8_e5m2) for piece in pieces])
            same(group.all_gather(byte), whole)
        assert traffic.bytes_sent == {"all_gather": 2 * (24 * 4 + 3 * 4 + 24)}
    finally:
        dist.all_gather_single = post


def test_backends_other_than_gloo_gather_equal_pieces_by_all_gather(ranks: RankPool):
    ranks.run(gather_as_on_an_accelerator, world_size=3)


# -- reducing ---------------------------------------------------------------------------------


def reduce_everywhere() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    tensors = [seeded(20 + r, 5, 3) for r in range(size)]
    stacked = torch.stack(tensors)
    reduced = [
        (SUM, stacked.sum(0)),
        (MAX, stacked.amax(0)),
        (MIN, stacked.amin(0)),
        (PRODUCT, stacked.prod(0)),
    ]
    for op, expected in reduced:
        mine = tensors[rank].clone()
        result = group.all_reduce(mine, op)
        assert result is mine
        close(result, expected)
    with record_traffic() as traffic:
        group.all_reduce(tensors[rank].clone())
    assert traffic.bytes_sent == {"all_reduce": 2 * (size - 1) * 60 // size}


@worlds
def test_all_reduce_is_the_reduction_of_all_tensors_in_place(ranks: RankPool, world_size: int):
    ranks.run(reduce_everywhere, world_size=world_size)


def reduce_and_scatter() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    for lengths, dim in itertools.product((None, uneven(size), [0, *[2] * (size - 1)]), (0, 1, 2)):
        parts = lengths or [3] * size
        shape = [3, 2, 4]
        shape[dim] = sum(parts)
        stacked = torch.stack([seeded(30 + r, *shape) for r in range(size)])
        for op, expected in (
            (SUM, stacked.sum(0)),
            (MAX, stacked.amax(0)),
            (MIN, stacked.amin(0)),
            (PRODUCT, stacked.prod(0)),
        ):
            with record_traffic() as traffic:
                mine = group.reduce_scatter(stacked[rank], dim, lengths=lengths, op=op)
            close(mine, expected.split(parts, dim)[rank])
            total = stacked[0].numel() * 4
            own = total * parts[rank] // sum(parts)
            assert traffic.calls == {"reduce_scatter": 1}
            if lengths:
                assert traffic.total_bytes == total - own
            else:
                assert traffic.total_bytes == total * (size - 1) // size


@worlds
def test_reduce_scatter_is_a_piece_of_the_reduction_also_for_uneven_lengths(
    ranks: RankPool, world_size: int
):
    ranks.run(reduce_and_scatter, world_size=world_size)


# -- all-to-all -------------------------------------------------------------------------------


def exchange_everywhere() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    for scatter, gather in itertools.permutations(range(3), 2):
        shape = [2, 2, 2]
        shape[scatter], shape[gather] = 3 * size, 5 * size
        whole = seeded(40, *shape)
        mine = whole.chunk(size, gather)[rank]
        with record_traffic() as traffic:
            out = group.all_to_all(mine, scatter, gather)
        same(out, whole.chunk(size, scatter)[rank].contiguous())
        assert traffic.calls == {"all_to_all": 1}
        assert traffic.total_bytes == mine.numel() * 4 * (size - 1) // size
        same(group.all_to_all(out, gather - 3, scatter - 3), mine.contiguous())


@worlds
def test_all_to_all_moves_a_shard_from_one_dimension_to_another_and_back(
    ranks: RankPool, world_size: int
):
    ranks.run(exchange_everywhere, world_size=world_size)


def exchange_uneven() -> None:
    group = everyone()
    size, rank = group.world_size, group.rank_in_group
    a, b = uneven(size), [*reversed(split_sizes(size + 1, size))]
    for scatter, gather in itertools.permutations(range(3), 2):
        shape = [2, 2, 2]
        shape[scatter], shape[gather] = sum(a), sum(b)
        whole = seeded(50, *shape)
        mine = whole.split(b, gather)[rank]
        with record_traffic() as traffic:
            out = group.all_to_all(mine, scatter, gather, scatter_lengths=a, gather_lengths=b)
        same(out, whole.split(a, scatter)[rank].contiguous())
        kept = mine.split(a, scatter)[rank].numel()
        assert traffic.total_bytes == 4 * (mine.numel() - kept)
        back = group.all_to_all(out, gather, scatter, scatter_lengths=b, gather_lengths=a)
        same(back, mine.contiguous())


@worlds
def test_all_to_all_with_uneven_and_empty_pieces_is_inverted_by_its_reverse(
    ranks: RankPool, world_size: int
):
    ranks.run(exchange_uneven, world_size=world_size)


# -- broadcast --------------------------------------------------------------------------------


def exchange_flat() -> None:
    for debug in (False, True):
        group = everyone(debug=debug)
        size, rank = group.world_size, group.rank
        # What rank s sends to rank r: r + 2 s elements, so rank 0 keeps nothing of its own.
        pieces = {(s, r): seeded(10 * s + r, r + 2 * s) for s in range(size) for r in range(size)}
        sends = [rank * 2 + r for r in range(size)]
        receives = [s * 2 + rank for s in range(size)]
        mine = torch.cat([pieces[rank, r] for r in range(size)])
        strided = torch.stack([mine, mine], 1)[:, 0]
        expected = torch.cat([pieces[s, rank] for s in range(size)])
        for tensor in (mine, strided):
            with record_traffic() as traffic:
                same(group.all_to_all_flat(tensor, sends, receives), expected)
            assert traffic.bytes_sent["all_to_all"] == 4 * (sum(sends) - sends[rank])


@worlds
def test_pieces_of_a_vector_reach_their_ranks(ranks: RankPool, world_size: int):
    ranks.run(exchange_flat, world_size=world_size)


def refuse_flat() -> None:
    group = everyone()
    for tensor, sends, receives, text in (
        (seeded(1, 2, 2), [2, 2], [2, 2], "takes a vector; got shape"),
        (seeded(1, 4), [2, 1], [2, 1], "add up to 3"),
        (seeded(1, 4), [2, 2], [4], "needs 2 lengths"),
        (seeded(1, 4), [2, 2], [3, 3], "keeps 2 elements"),
    ):
        with pytest.raises(ParallelConfigError, match=text):
            group.all_to_all_flat(tensor, sends, receives)


def test_sizes_that_do_not_fit_a_vector_are_refused(ranks: RankPool):
    ranks.run(refuse_flat)
    alone = GroupCoordinator([[0]], 0, "gloo")
    same(alone.all_to_all_flat(seeded(1, 3), [3], [3]), seeded(1, 3))


def broadcast_from_each() -> None:
    group = everyone()
    for src in range(group.world_size):
        mine = seeded(60 + group.rank, 3, 4)
        with record_traffic() as traffic:
            result = group.broadcast(mine, src)
        assert result is mine
        same(mine, seeded(60 + src, 3, 4))
        sent = 48 * (group.world_size - 1) if group.rank == src else 0
        assert (traffic.calls, traffic.total_bytes) == ({"broadcast": 1}, sent)


@worlds
def test_broadcast_fills_the_tensor_with_that_of_the_source(ranks: RankPool, world_size: int):
    ranks.run(broadcast_from_each, world_size=world_size)


# -- memory -----------------------------------------------------------------------------------


def strided_in_place() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    # Whole numbers: their sums are the same in every order.
    tensors = [seeded(70 + r, 3, 4, dtype=torch.int64).float() for r in range(size)]
    reduced = Guarded(tensors[rank])
    assert group.all_reduce(reduced.tensor) is reduced.tensor
    reduced.holds(sum(tensors[1:], tensors[0]))
    told = Guarded(tensors[rank])
    assert group.broadcast(told.tensor, 1) is told.tensor
    told.holds(tensors[1])
    turned = tensors[rank].t().contiguous().t()
    assert not turned.is_contiguous()
    same(group.broadcast(turned, 0), tensors[0])
    image = seeded(rank, 1, 3, 2, 2).to(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    same(group.broadcast(image, 1), seeded(1, 1, 3, 2, 2))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_strided_tensor_is_filled_and_its_neighbours_are_left_alone(
    ranks: RankPool, world_size: int
):
    ranks.run(strided_in_place, world_size=world_size)


def strided_inputs() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    wholes = [seeded(80 + r, 2 * size, 3 * size) for r in range(size)]
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: Guarded(t).tensor,
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    ]
    for layout in layouts:
        mine = layout(wholes[rank])
        assert not mine.is_contiguous()
        copy = mine.clone()
        same(group.all_gather(mine, 1), torch.cat(wholes, 1))
        same(group.all_gather(mine, 0), torch.cat(wholes, 0))
        pieces = [whole.chunk(size, 0)[rank] for whole in wholes]
        same(group.all_to_all(mine, 0, 1), torch.cat(pieces, 1))
        close(group.reduce_scatter(mine), torch.stack(wholes).sum(0).chunk(size)[rank])
        joined = group.gather(mine, 0, 0)
        if joined is not None:
            same(joined, torch.cat(wholes))
        same(ring_shift(mine, group), wholes[(rank - 1) % size])
        before, after = halo_exchange(mine, 1, 2, 1, group)
        same(before, wholes[rank - 1][:, -2:].contiguous() if rank else mine[:, :0])
        same(after, wholes[rank + 1][:, :1].contiguous() if rank < size - 1 else mine[:, :0])
        same(mine, copy)


@pytest.mark.parametrize("world_size", [2, 3])
def test_strided_inputs_are_sent_as_they_read_and_not_changed(ranks: RankPool, world_size: int):
    ranks.run(strided_inputs, world_size=world_size)


def empty_tensors() -> None:
    group = everyone()
    nothing = torch.empty(0, 3)
    same(group.all_reduce(nothing.clone()), nothing)
    same(group.broadcast(nothing.clone(), 1), nothing)
    same(group.all_gather(nothing), nothing)
    same(group.all_gather(nothing, 1), torch.empty(0, 9))
    same(group.reduce_scatter(nothing, 1), torch.empty(0, 1))
    same(group.all_to_all(nothing, 1, 0), torch.empty(0, 1))
    same(ring_shift(nothing, group), nothing)
    joined = group.gather(nothing, 2, 0)
    assert (joined is None) == (group.rank != 2)
    same(group.all_reduce(torch.ones(2)), torch.full((2,), 3.0))


def test_empty_tensors_pass_every_collective(ranks: RankPool):
    ranks.run(empty_tensors, world_size=3)


# -- dtypes -----------------------------------------------------------------------------------


def move_every_dtype() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    for dtype in MOVED:
        pieces = [seeded(90 + r, size, 3).to(dtype) for r in range(size)]
        if not dtype.is_floating_point:
            pieces = [seeded(90 + r, size, 3, dtype=dtype) for r in range(size)]
        mine = pieces[rank]
        whole = torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)
        same(group.all_gather(mine), whole)
        lengths = list(range(1, size + 1))
        cut = [piece[: r + 1] for r, piece in enumerate(pieces)]
        expected = torch.cat([piece.view(torch.uint8) for piece in cut]).view(dtype)
        same(group.all_gather(cut[rank], lengths=lengths), expected)
        same(group.broadcast(mine.clone(), 1), pieces[1])
        same(ring_shift(mine, group), pieces[rank - 1])
        halves = group.all_to_all(mine, 0, 1)
        for r, piece in enumerate(halves.split(3, 1)):
            same(piece.contiguous(), pieces[r][rank : rank + 1])
        joined = group.gather(mine, 0, 0)
        if joined is not None:
            same(joined, whole)
        before, _ = halo_exchange(mine, 0, 1, 0, group)
        same(before, pieces[rank - 1][-1:] if rank else mine[:0])
        if rank == 0:
            group.send(mine)
        if rank == 1:
            same(group.recv(mine.shape, dtype), pieces[0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_dtype_travels_bit_for_bit(ranks: RankPool, world_size: int):
    ranks.run(move_every_dtype, world_size=world_size)


def reduce_every_dtype() -> None:
    group = everyone()
    rank, size = group.rank_in_group, group.world_size
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        values = [(seeded(95 + r, 4, dtype=torch.int64) % 8 + 1).to(dtype) for r in range(size)]
        expected = torch.stack(values).sum(0, dtype=dtype)
        same(group.all_reduce(values[rank].clone()), expected)
        lengths = [4, *[0] * (size - 1)]
        piece = group.reduce_scatter(values[rank], lengths=lengths)
        same(piece, expected.split(lengths)[rank])


def test_reductions_keep_the_dtype(ranks: RankPool):
    ranks.run(reduce_every_dtype, world_size=3)


# -- what cannot be ---------------------------------------------------------------------------

Call = Callable[[GroupCoordinator, Tensor], object]
REFUSED: list[tuple[Call, str]] = [
    (lambda g, t: g.all_gather(t, 2), "dim=2 does not exist in a tensor of shape (4, 3); legal"),
    (lambda g, t: g.gather(t, dim=-3), "dim=-3 does not exist"),
    (lambda g, t: g.all_gather(torch.tensor(1.0)), "dim=0 of a tensor without dimensions; pass"),
    (lambda g, t: g.all_gather(t, lengths=[4]), "it needs 2 lengths"),
    (lambda g, t: g.all_gather(t, lengths=[4, -1]), "none negative"),
    (lambda g, t: g.all_gather(t, lengths=[5, 5]), "length 4 along dimension 0, where lengths=[5"),
    (lambda g, t: g.gather(t, 2), "dst=2 is no group rank of group 'all', which has 2 ranks"),
    (lambda g, t: g.broadcast(t, -1), "src=-1 is no group rank"),
    (lambda g, t: g.reduce_scatter(t, 1), "cannot be split evenly over the 2 ranks"),
    (lambda g, t: g.reduce_scatter(t, 1), "nearest lengths that can: 2 and 4"),
    (lambda g, t: g.reduce_scatter(t, lengths=[3, 2]), "add up to 5, but dimension 0"),
    (lambda g, t: g.reduce_scatter(t, lengths=[4]), "it needs 2 lengths"),
    (lambda g, t: g.reduce_scatter(t, op=dist.ReduceOp.AVG), "legal here: SUM, MAX, MIN, PRODUCT"),
    (lambda g, t: g.all_to_all(t, 0, -2), "they must be two dimensions"),
    (lambda g, t: g.all_to_all(t, 1, 0), "dimension 1 of shape (4, 3) cannot be split evenly"),
    (lambda g, t: g.all_to_all(t, 0, 1, gather_lengths=[1, 2]), "lengths=[1, 2] say"),
]


def refuse() -> list[str]:
    group = everyone()
    with record_traffic() as traffic:
        messages = [
            raised(lambda: call(group, seeded(1, 4, 3)), ParallelConfigError)  # noqa: B023
            for call, _ in REFUSED
        ]
    assert traffic.total_calls == 0
    return messages


def test_what_cannot_be_is_refused_on_all_ranks_before_anything_is_sent(ranks: RankPool):
    for messages in ranks.run(refuse):
        for message, (_, expected) in zip(messages, REFUSED, strict=True):
            assert expected in message


def reduce_what_only_travels() -> None:
    group = everyone()
    for dtype in (torch.int16, torch.float8_e4m3fn):
        values = torch.ones(4).to(dtype)
        for call in (group.all_reduce, group.reduce_scatter):
            message = raised(lambda: call(values), ParallelConfigError)  # noqa: B023
            assert "cannot be reduced over ranks, only moved" in message


def test_a_dtype_that_only_travels_is_not_reduced(ranks: RankPool):
    ranks.run(reduce_what_only_travels)


def conjugates() -> None:
    group = everyone()
    values = torch.complex(seeded(group.rank, 4), seeded(9, 4))
    whole = torch.cat([torch.complex(seeded(r, 4), -seeded(9, 4)) for r in group.ranks])
    same(torch.view_as_real(as_whole(group.all_gather(values.conj()))), torch.view_as_real(whole))
    total = group.all_reduce(values.clone().conj())
    expected = sum(whole.split(4)[1:], whole.split(4)[0])
    same(torch.view_as_real(total.resolve_conj()), torch.view_as_real(expected))
    negative = values.conj().imag
    assert negative.is_neg()
    same(as_whole(group.all_gather(negative)), torch.cat([-seeded(9, 4)] * 2))
    shared = values.clone().conj()
    group.broadcast(shared, 1)
    same(torch.view_as_real(shared.resolve_conj()), torch.view_as_real(whole[4:]))


def as_whole(gathered: object) -> torch.Tensor:
    assert isinstance(gathered, torch.Tensor)
    return gathered


def test_views_whose_memory_holds_conjugate_or_negative_values_are_resolved(ranks: RankPool):
    ranks.run(conjugates)


def out_of_memory() -> None:
    group = everyone()
    assert group.checked is not None

    def full() -> None:
        message = "CUDA out of memory"
        raise torch.OutOfMemoryError(message)

    raised(lambda: group.checked.run("all_reduce", full), torch.OutOfMemoryError)
    same(group.all_reduce(torch.ones(2)), torch.full((2,), 2.0))


def test_a_full_device_is_not_called_the_death_of_a_rank(ranks: RankPool):
    ranks.run(out_of_memory)


def over_the_cpu_group() -> None:
    device, cpu = dist.new_group([0, 1]), dist.new_group([0, 1])
    assert isinstance(device, dist.ProcessGroup)
    assert isinstance(cpu, dist.ProcessGroup)
    group = GroupCoordinator.from_process_group(device, cpu_group=cpu)
    dist.destroy_process_group(device)  # whoever used it would fail
    group.all_reduce(seeded(1, 4))
    group.all_gather(seeded(1, 4))
    group.gather(seeded(1, 4))
    group.reduce_scatter(seeded(1, 4))
    group.reduce_scatter(seeded(1, 4), lengths=[3, 1])
    group.all_to_all(seeded(1, 4, 4), 0, 1)
    group.broadcast(seeded(1, 4))
    ring_shift(seeded(1, 4), group)
    halo_exchange(seeded(1, 4), 0, 1, 1, group)


def test_cpu_tensors_of_every_operation_take_the_cpu_group(ranks: RankPool):
    """An accelerator's group (nccl) cannot move them."""
    ranks.run(over_the_cpu_group)
