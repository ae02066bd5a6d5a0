"""Attention of local queries to keys that come block by block from the ranks of a ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_group_coordinator import GroupCoordinator, RingComm
from omni_sp.attention.merge import MergedAttention
from omni_sp.kernels import AttentionKernel
from omni_sp.shards import Run


@dataclass(frozen=True)
class KeyBlock:
    """Keys and values of some tokens."""

    key: Tensor
    """``(batch, tokens, heads, head_dim)``."""
    value: Tensor
    """Like the key; its head width may differ."""
    runs: tuple[Run, ...]
    """Where the tokens stand in the whole sequence, in their order."""

    def part(self, first: int, last: int) -> KeyBlock:
        """The tokens of the runs with these indices, the last one excluded."""
        before = sum(run.length for run in self.runs[:first])
        length = sum(run.length for run in self.runs[first:last])
        key, value = (t.narrow(1, before, length) for t in (self.key, self.value))
        return KeyBlock(key, value, self.runs[first:last])


def rotating(
    key: Tensor, value: Tensor, runs: Sequence[tuple[Run, ...]], group: GroupCoordinator
) -> Iterator[KeyBlock]:
    """The block of every rank, own first, passed on round the ring (arXiv 2310.01889).

    The next block is under way while the caller works on the one it was given.

    Args:
        key: ``(batch, own tokens, heads, head_dim)``.
        value: Like the key.
        runs: Where the tokens of each rank stand in the whole sequence.
        group: The ranks.
    """
    size, rank = group.world_size, group.rank_in_group
    ring, width = RingComm(group), key.shape[3]
    current = torch.cat([key, value], 3)
    for step in range(size):
        owner = (rank - step) % size
        following = current
        if step + 1 < size:
            tokens = sum(run.length for run in runs[(owner - 1) % size])
            following = current.new_empty(current.shape[0], tokens, *current.shape[2:])
            ring.send_recv(current, following)
            ring.commit()
        yield KeyBlock(current[..., :width], current[..., width:], runs[owner])
        if step + 1 < size:
            ring.wait()
        current = following


def gathered(
    key: Tensor, value: Tensor, runs: Sequence[tuple[Run, ...]], group: GroupCoordinator
) -> KeyBlock:
    """The blocks of all ranks as one, in rank order, by one all-gather of keys and values."""
    lengths = [sum(run.length for run in of_rank) for of_rank in runs]
    both = group.all_gather(torch.cat([key, value], 3), 1, lengths=lengths)
    key, value = torch.split(both, [key.shape[3], value.shape[3]], 3)
    return KeyBlock(key, value, tuple(run for of_rank in runs for run in of_rank))


def merged_causal(
    query: Tensor,
    runs: Sequence[Run],
    blocks: Iterator[KeyBlock],
    kernel: AttentionKernel,
    dtype: torch.dtype,
    scale: float | None,
) -> Tensor:
    """Causal attention: each run of queries attends to the runs before it and, in part, to itself.

    Runs of queries and runs of keys are the same or apart, whichever rank holds them, so no pair
    of runs needs a mask, and pairs that see nothing of each other cost nothing.

    Args:
        query: ``(batch, tokens, heads, head_dim)``.
        runs: Where the queries stand in the whole sequence, in their order.
        blocks: The keys.
        kernel: Computes a block.
        dtype: In which blocks are merged.
        scale: Factor of the scores.
    """
    queries = torch.split(query, [run.length for run in runs] or [0], 1)
    merged = [MergedAttention(dtype) for _ in runs]
    width = 0
    for block in blocks:  # to the end, even without queries: the others want what we pass on
        width = block.value.shape[-1]
        for rows, run, into in zip(queries, runs, merged, strict=False):
            for index, keys in enumerate(block.runs):
                if keys.start > run.start or not rows.numel():
                    continue
                part = block.part(index, index + 1)
                into.add(
                    *kernel.attend_with_lse(
                        rows,
                        part.key,
                        part.value,
                        attn_mask=None,
                        is_causal=keys == run,
                        scale=scale,
                    )
                )
    found = [out for m in merged if (out := m.result(query.dtype)) is not None]
    return torch.cat(found, 1) if found else query.new_zeros(*query.shape[:3], width)
