"""Debug mode: the ranks of a group compare what they are about to do, before they do it.

Mismatched calls are the costliest mistakes in this field: on gloo a wrong shape ends the process
or leaves stale data, on nccl it hangs. torch's own ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` compares
shapes of collectives only; this one also compares splits, roots and the peers of an exchange.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from omni_group_coordinator.errors import RankMismatchError

DEBUG_VARIABLE = "OMNI_PARALLEL_DEBUG"
"""Environment variable that turns the debug mode on for every group (any value but 0)."""

_TEXT_BYTES = 512


def debug_by_default() -> bool:
    """Whether the environment asks for the debug mode."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def describe_call(operation: str, shape: Sequence[object], dtype: torch.dtype, more: str) -> str:
    """One line that must be the same on every rank of the group."""
    sizes = ", ".join(str(size) for size in shape)
    text = f"{operation} of shape ({sizes}) and dtype {str(dtype).removeprefix('torch.')}"
    return f"{text}, {more}" if more else text


def agree_on_call(group: ProcessGroup, ranks: Sequence[int], name: str, call: str) -> None:
    """Compare the call over the ranks.

    Args:
        group: A group that moves CPU tensors.
        ranks: Global ranks of the group, for the message.
        name: Name of the group, for the message.
        call: What this rank is about to do, from `describe_call`.

    Raises:
        RankMismatchError: On every rank alike, with what each rank was about to do.
    """
    calls = [_unpack(row) for row in _gather(group, _pack(call), len(ranks))]
    if all(other == calls[0] for other in calls):
        return
    who: dict[str, list[int]] = defaultdict(list)
    for rank, other in zip(ranks, calls, strict=True):
        who[other].append(rank)
    lines = [f"  {_ranks(members)}: {other}" for other, members in who.items()]
    msg = f"the ranks of group {name!r} do not agree on the next operation:\n" + "\n".join(lines)
    raise RankMismatchError(msg)


def agree_on_exchange(
    group: ProcessGroup,
    ranks: Sequence[int],
    name: str,
    call: str,
    sends: Sequence[int],
    receives: Sequence[int],
) -> None:
    """Compare an exchange: what each rank sends must be what its peer expects.

    Args:
        group: A group that moves CPU tensors.
        ranks: Global ranks of the group, for the message.
        name: Name of the group, for the message.
        call: What this rank is about to do, without sizes.
        sends: Elements for each group rank.
        receives: Elements expected from each group rank.

    Raises:
        RankMismatchError: On every rank alike, naming each pair that differs.
    """
    agree_on_call(group, ranks, name, call)
    size = len(ranks)
    mine = torch.tensor([*sends, *receives], dtype=torch.int64)
    rows = [row.tolist() for row in _gather(group, mine, size)]
    lines = [
        f"  rank {ranks[src]} sends {rows[src][dst]} elements to rank {ranks[dst]}, which "
        f"expects {rows[dst][size + src]}"
        for src in range(size)
        for dst in range(size)
        if rows[src][dst] != rows[dst][size + src]
    ]
    if lines:
        msg = f"{call} in group {name!r}: the ranks disagree on sizes:\n" + "\n".join(lines)
        raise RankMismatchError(msg)


def _gather(group: ProcessGroup, mine: torch.Tensor, size: int) -> list[torch.Tensor]:
    rows = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(rows, mine, group=group)
    return rows


def _pack(call: str) -> torch.Tensor:
    data = call.encode()
    if len(data) > _TEXT_BYTES:
        # Cut for the message, but still different where the uncut texts differ.
        digest = hashlib.sha256(data).hexdigest()[:16].encode()
        data = data[: _TEXT_BYTES - 32].decode(errors="ignore").encode() + b"... #" + digest
    return torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)


def _unpack(row: torch.Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode()


def _ranks(members: Sequence[int]) -> str:
    return ("rank " if len(members) == 1 else "ranks ") + ", ".join(map(str, members))
