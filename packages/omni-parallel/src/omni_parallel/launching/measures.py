"""What a rank measures of itself."""

from __future__ import annotations

import resource
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of the accelerator if it has one, else resident."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weight_bytes(parts: Iterable[object]) -> int:
    """Bytes of the parameters of some modules that this process holds; others are passed over."""
    found = {p for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    held = (p.to_local() if isinstance(p, DTensor) else p for p in found)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
