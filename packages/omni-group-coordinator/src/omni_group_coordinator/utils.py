"""Small pure helpers: devices, backends and the arithmetic of balanced shards."""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from omni_group_coordinator.errors import ParallelConfigError

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""How long a collective may wait for its peers before it fails."""

# torch's own table of default backends is private; these are the pairs that its documentation
# names, plus hccl, which the NPU extension registers.
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl", "npu": "hccl", "hpu": "hccl"}


def backend_for_device(device_type: str) -> str:
    """The torch.distributed backend that moves tensors of this device type.

    ROCm devices are of type ``"cuda"`` in torch, and their nccl is RCCL.

    Raises:
        ParallelConfigError: No backend is known for the device type.
    """
    try:
        return _BACKENDS[device_type]
    except KeyError:
        known = ", ".join(sorted(_BACKENDS))
        msg = (
            f"no torch.distributed backend is known for device type {device_type!r} "
            f"(known: {known}); pass backend= with the one that your torch build registers"
        )
        raise ParallelConfigError(msg) from None


def get_local_device(local_rank: int | None = None) -> torch.device:
    """The device of this process: an accelerator with the index of its local rank, or the CPU.

    Args:
        local_rank: Rank on this host; default: the variable ``LOCAL_RANK``, else the
            accelerator's current device. Where each process sees one device only, that one.

    Raises:
        ParallelConfigError: The host has several devices, but fewer than the local rank needs.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    if local_rank is None:
        text = os.environ.get("LOCAL_RANK")
        local_rank = int(text) if text else torch.accelerator.current_device_index()
    count = torch.accelerator.device_count()
    if local_rank >= count > 1:
        msg = (
            f"local rank {local_rank} has no {accelerator.type} device: this process sees {count}; "
            f"start at most {count} processes on this host, make one device visible to each, or "
            "pass device="
        )
        raise ParallelConfigError(msg)
    return torch.device(accelerator.type, 0 if count == 1 else local_rank)


def check_timeout(timeout: object) -> timedelta:
    """The timeout itself; 10 minutes for ``None``.

    Raises:
        ParallelConfigError: It is no `timedelta`, or not positive.
    """
    if timeout is None:
        return DEFAULT_TIMEOUT
    if not isinstance(timeout, timedelta) or timeout <= timedelta(0):
        msg = (
            f"timeout={timeout!r} is no positive datetime.timedelta; legal, for example: "
            "timedelta(minutes=10)"
        )
        raise ParallelConfigError(msg)
    return timeout


def split_sizes(total: int, parts: int) -> list[int]:
    """Sizes of a balanced split: they differ by at most one, the larger ones come first.

    Every rank can compute it for every other rank, so no rank has to ask.

    Args:
        total: Length to split, 0 or more.
        parts: Number of parts, 1 or more; parts beyond ``total`` are empty.

    Raises:
        ParallelConfigError: ``total`` is negative or ``parts`` is below 1.
    """
    if total < 0 or parts < 1:
        msg = f"cannot split a length of {total} into {parts} parts; legal: total >= 0, parts >= 1"
        raise ParallelConfigError(msg)
    base, larger = divmod(total, parts)
    return [base + 1] * larger + [base] * (parts - larger)


def build_local_sp_padding_mask(
    batch_size: int,
    local_seq_len: int,
    sp_original_seq_len: int,
    sp_padding_size: int,
    sequence_parallel_rank: int,
    device: torch.device | str | None = None,
) -> torch.Tensor | None:
    """Mask of the real tokens of one rank, when a sequence was padded at its end and then split.

    Args:
        batch_size: Number of rows of the mask.
        local_seq_len: Tokens per rank, padding included; the same on every rank.
        sp_original_seq_len: Tokens of the whole sequence before padding.
        sp_padding_size: Tokens that were appended.
        sequence_parallel_rank: Rank in the sequence-parallel group.
        device: Where the mask is made; default: torch's default device.

    Returns:
        ``None`` if nothing was padded, and so on every rank or on none (a rank that holds real
        tokens only gets a mask of ``True``). Otherwise bool of shape ``(batch, local_seq_len)``,
        ``True`` for a real token.
    """
    if sp_padding_size == 0:
        return None
    position = torch.arange(local_seq_len, device=device) + sequence_parallel_rank * local_seq_len
    return (position < sp_original_seq_len).expand(batch_size, local_seq_len)
