"""Ulysses: ranks exchange their shard of the sequence for a share of the heads, and back.

DeepSpeed-Ulysses, arXiv 2309.14509. Shapes are ``(batch, sequence, heads, head_dim)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator
from omni_sp.attention.heads import HeadShare

Ranges = Sequence[tuple[int, int]]
"""For each rank the heads of a tensor that it computes with, as a half-open range."""


def gather_sequence(
    packs: Sequence[Sequence[tuple[Tensor, Ranges]]],
    lengths: Sequence[Sequence[int]],
    group: GroupCoordinator,
) -> list[Tensor]:
    """Give each rank all tokens of its heads, of several tensors in one collective.

    Args:
        packs: Tensors of one length and head width travel side by side, as one pack; each with
            the heads that go to each rank (those of two ranks may overlap).
        lengths: Tokens of each rank, for each pack.
        group: The ranks.

    Returns:
        The tensors of all packs in order: ``(batch, tokens of all ranks, own heads, head_dim)``.
    """
    widths = [
        [sum(stop - start for start, stop in (heads[rank] for _, heads in pack)) for pack in packs]
        for rank in range(group.world_size)
    ]
    firsts = [pack[0][0] for pack in packs]
    rows = [first.shape[0] * first.shape[-1] for first in firsts]  # elements per token and head
    sent = [
        sum(n * first.shape[1] * w for n, first, w in zip(rows, firsts, widths[rank], strict=True))
        for rank in range(group.world_size)
    ]
    mine = widths[group.rank_in_group]
    received = [
        sum(n * tokens[rank] * w for n, tokens, w in zip(rows, lengths, mine, strict=True))
        for rank in range(group.world_size)
    ]
    flat = group.all_to_all_flat(_packed(packs, group.world_size), sent, received)
    return _unpacked(flat, packs, lengths, mine, group)


def _packed(packs: Sequence[Sequence[tuple[Tensor, Ranges]]], world_size: int) -> Tensor:
    if len(packs) == 1 and all(_even(tensor, heads) for tensor, heads in packs[0]):
        split = [
            torch.unflatten(tensor, 2, (world_size, -1)).permute(2, 0, 1, 3, 4)
            for tensor, _ in packs[0]
        ]
        return torch.cat(split, 3).reshape(-1)  # one kernel, each element copied once
    pieces = [
        torch.cat([tensor[:, :, slice(*heads[rank])] for tensor, heads in pack], 2).reshape(-1)
        for rank in range(world_size)
        for pack in packs
    ]
    return torch.cat(pieces)


def _even(tensor: Tensor, heads: Ranges) -> bool:
    share = tensor.shape[2] // len(heads)
    return all(one == (r * share, (r + 1) * share) for r, one in enumerate(heads)) and (
        share * len(heads) == tensor.shape[2]
    )


def _unpacked(
    flat: Tensor,
    packs: Sequence[Sequence[tuple[Tensor, Ranges]]],
    lengths: Sequence[Sequence[int]],
    widths: Sequence[int],
    group: GroupCoordinator,
) -> list[Tensor]:
    batch = packs[0][0][0].shape[0]
    shapes = [
        [(batch, tokens[rank], width, pack[0][0].shape[-1]) for rank in range(group.world_size)]
        for pack, tokens, width in zip(packs, lengths, widths, strict=True)
    ]
    if len(packs) == 1 and batch == 1:  # what the ranks sent is one run of tokens already
        wholes = [flat.view(1, sum(lengths[0]), widths[0], shapes[0][0][-1])]
    else:
        order = [shapes[p][rank] for rank in range(group.world_size) for p in range(len(packs))]
        parts = torch.split(flat, [math.prod(shape) for shape in order])
        views = [part.view(shape) for part, shape in zip(parts, order, strict=True)]
        wholes = [torch.cat(views[p :: len(packs)], 1) for p in range(len(packs))]
    rank = group.rank_in_group
    found: list[Tensor] = []
    for pack, whole in zip(packs, wholes, strict=True):
        counts = [heads[rank][1] - heads[rank][0] for _, heads in pack]
        found += torch.split(whole, counts, 2)
    return found


def gather_heads(
    tensor: Tensor,
    shares: Sequence[HeadShare],
    lengths: Sequence[int],
    group: GroupCoordinator,
    shared: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Give each rank all heads of its tokens: the way back.

    Args:
        tensor: ``(batch, tokens of all ranks, own heads, head_dim)``: first those of each rank in
            turn, then ``shared`` ones that every rank wants.
        shares: Heads of each rank.
        lengths: Tokens of each rank, without the shared ones.
        group: The ranks.
        shared: Number of tokens at the end that go to every rank.

    Returns:
        ``(batch, own tokens, heads, head_dim)``, and ``(batch, shared, heads, head_dim)`` or
        ``None`` if nothing is shared.
    """
    batch, _, own_heads, width = tensor.shape
    mine = lengths[group.rank_in_group]
    sent = [batch * (length + shared) * own_heads * width for length in lengths]
    received = [batch * (mine + shared) * share.size * width for share in shares]
    if batch == 1 and not shared:
        flat = tensor.reshape(-1)  # the tokens of each rank lie together
    else:
        *parts, rest = torch.split(tensor, [*lengths, shared], 1)
        flat = torch.cat([piece.reshape(-1) for part in parts for piece in (part, rest)])
    flat = group.all_to_all_flat(flat, sent, received)
    own, common = [], []
    for piece, share in zip(torch.split(flat, received), shares, strict=True):
        first = batch * mine * share.size * width
        own.append(piece[:first].view(batch, mine, share.size, width))
        common.append(piece[first:].view(batch, shared, share.size, width))
    return torch.cat(own, 2), torch.cat(common, 2) if shared else None
