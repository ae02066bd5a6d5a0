"""What travels: tensors whose memory is what their shape says, of dtypes that backends know."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_group_coordinator.errors import ParallelConfigError

# What backends do not know travels unchanged as a dtype of the same size that they do know.
_CARRIERS = {
    dtype: carrier
    for name, carrier in (
        ("float8_e4m3fn", torch.uint8),
        ("float8_e4m3fnuz", torch.uint8),
        ("float8_e5m2", torch.uint8),
        ("float8_e5m2fnuz", torch.uint8),
        ("float8_e8m0fnu", torch.uint8),
        ("int16", torch.float16),
        ("uint16", torch.float16),
        ("uint32", torch.int32),
        ("uint64", torch.int64),
    )
    if (dtype := getattr(torch, name, None)) is not None
}


def transportable(tensor: Tensor) -> Tensor:
    """The same memory, as a dtype that every backend moves."""
    carrier = _CARRIERS.get(tensor.dtype)
    return tensor if carrier is None else tensor.view(carrier)


def byte_count(tensor: Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def check_strided(tensor: Tensor) -> None:
    """Check that a tensor has memory to send.

    Raises:
        ParallelConfigError: It is sparse.
    """
    # Dynamo cannot ask every traced tensor (a gradient) for its layout.
    if not torch.compiler.is_compiling() and tensor.layout is not torch.strided:
        msg = f"a tensor of layout {tensor.layout} does not travel; pass tensor.to_dense()"
        raise ParallelConfigError(msg)


def check_reducible(dtype: torch.dtype) -> None:
    """Check that backends can add and compare values of a dtype.

    Raises:
        ParallelConfigError: They only carry its bits.
    """
    if dtype in _CARRIERS:
        msg = (
            f"{str(dtype).removeprefix('torch.')} cannot be reduced over ranks, only moved; "
            "nearest: float32, bfloat16, float16, int32, int64, int8 or uint8"
        )
        raise ParallelConfigError(msg)


def is_plain(tensor: Tensor) -> bool:
    """Whether a backend that reads or fills the memory from end to end does the right thing."""
    if torch.compiler.is_compiling():  # which cannot ask for these bits; reals hardly have them
        return tensor.is_contiguous() and not tensor.is_complex()
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def resolved(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its memory holds conjugate or negative values of what it means.

    Raises:
        ParallelConfigError: It is sparse.
    """
    check_strided(tensor)
    return tensor.resolve_conj().resolve_neg()
