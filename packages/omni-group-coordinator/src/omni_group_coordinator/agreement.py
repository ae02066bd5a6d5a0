"""Debug mode: the ranks of a group compare what they are about to do, before they do it.

Mismatched calls are the costliest mistakes in this field: on gloo a wrong shape ends the process
or leaves stale data, on nccl it hangs. torch's own ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` compares
shapes of collectives only; this one also compares splits, roots and the peers of an exchange.
Regions that torch.compile has traced run without these checks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

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
    lines = differences([unpack(row) for row in _gather(group, pack(call), len(ranks))], ranks)
    if not lines:
        return
    msg = f"the ranks of group {name!r} do not agree on the next operation:\n" + "\n".join(lines)
    raise RankMismatchError(msg)


def differences(texts: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """One line for each distinct text, with the ranks that it comes from; none if all agree."""
    who: dict[str, list[int]] = defaultdict(list)
    for rank, text in zip(ranks, texts, strict=True):
        who[text].append(rank)
    if len(who) < 2:
        return []
    return [f"  {_ranks(members)}: {text}" for text, members in who.items()]


def agree_on_exchange(
    group: ProcessGroup,
    ranks: Sequence[int],
    name: str,
    operation: str,
    sends: Mapping[int, str],
    receives: Mapping[int, str],
) -> None:
    """Compare an exchange: what each rank sends must be what its peer expects.

    Args:
        group: A group that moves CPU tensors.
        ranks: Global ranks of the group, for the message.
        name: Name of the group, for the message.
        operation: Word for the operation, for the message.
        sends: What goes to each group rank, in words; ranks to which nothing goes are left out.
        receives: What is expected of each group rank, in the same words.

    Raises:
        RankMismatchError: On every rank alike, naming each pair that differs.
    """
    size = len(ranks)
    texts = [_gather_texts(group, json.dumps(side), size) for side in (dict(sends), dict(receives))]
    sent, expected = ([json.loads(text) for text in side] for side in texts)
    pairs = [
        (src, dst, sent[src].get(str(dst), "nothing"), expected[dst].get(str(src), "nothing"))
        for src in range(size)
        for dst in range(size)
    ]
    lines = [
        f"  rank {ranks[src]} sends {what} to rank {ranks[dst]}, which expects {other}"
        for src, dst, what, other in pairs
        if what != other
    ]
    if lines:
        msg = (
            f"{operation} in group {name!r}: the ranks disagree on what they exchange:\n"
            + "\n".join(lines)
        )
        raise RankMismatchError(msg)


def _gather_texts(group: ProcessGroup, text: str, size: int) -> list[str]:
    """The texts of all ranks, of any length."""
    data = text.encode()
    lengths = [int(n) for n in _gather(group, torch.tensor([len(data)], dtype=torch.int64), size)]
    padded = bytearray(data.ljust(max(lengths), b"\0"))
    rows = _gather(group, torch.frombuffer(padded, dtype=torch.uint8), size)
    return [bytes(r.tolist()[:n]).decode() for r, n in zip(rows, lengths, strict=True)]


def _gather(group: ProcessGroup, mine: torch.Tensor, size: int) -> list[torch.Tensor]:
    rows = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(rows, mine, group=group)
    return rows


def pack(call: str) -> torch.Tensor:
    """A text as a row of fixed size, cut if it must be."""
    data = call.encode()
    if len(data) > _TEXT_BYTES:
        # Cut for the message, but still different where the uncut texts differ.
        digest = hashlib.sha256(data).hexdigest()[:16].encode()
        data = data[: _TEXT_BYTES - 32].decode(errors="ignore").encode() + b"... #" + digest
    return torch.frombuffer(bytearray(data.ljust(_TEXT_BYTES, b"\0")), dtype=torch.uint8)


def unpack(row: torch.Tensor) -> str:
    """The text of a row."""
    return bytes(row.tolist()).rstrip(b"\0").decode()


def _ranks(members: Sequence[int]) -> str:
    return ("rank " if len(members) == 1 else "ranks ") + ", ".join(map(str, members))
