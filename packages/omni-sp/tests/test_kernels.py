"""Attention on one device, with its log-sum-exp, is what the formula says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_sp.kernels import TorchKernel

DEVICES = ["cpu"]
if torch.accelerator.is_available():
    DEVICES.append(str(torch.accelerator.current_accelerator()))

BOUNDS = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference of an output, by dtype."""


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """In float64 on the CPU."""
    group = query.shape[2] // key.shape[2]
    query, key, value = (t.cpu().double().transpose(1, 2) for t in (query, key, value))
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        mask = mask.cpu()
        bias = mask.double() if mask.dtype is not torch.bool else torch.where(mask, 0.0, -math.inf)
        scores = scores + bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def masks(queries: int, keys: int) -> dict[str, Tensor | None]:
    """Of two rows and four heads; rows that attend to nothing among them."""
    random = seeded(2, 1, queries, keys, seed=5) > 0
    random[0, 0, 3] = False
    return {
        "none": None,
        "padding": (torch.arange(keys) < torch.tensor([[keys], [keys - 5]]))[:, None, None],
        "pairs": random,
        "bias": seeded(2, 4, queries, keys, seed=6),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [10, 12, 16, 64, 128])
@pytest.mark.parametrize("kind", ["none", "padding", "pairs", "bias", "causal"])
@pytest.mark.parametrize("lengths", [(37, 21), (64, 64)])
def test_output_and_log_sum_exp(
    device: str, dtype: torch.dtype, width: int, kind: str, lengths: tuple[int, int]
) -> None:
    queries, keys = lengths if kind != "causal" else (lengths[0], lengths[0])
    made: Any = [
        seeded(2, length, heads, width, seed=seed).to(device, dtype)
        for seed, (length, heads) in enumerate([(queries, 4), (keys, 2), (keys, 2)])
    ]
    mask = None if kind == "causal" else masks(queries, keys)[kind]
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    scale, causal = 0.3, kind == "causal"
    given = None if mask is None else mask.to(device)
    options: Any = {"attn_mask": given, "is_causal": causal, "scale": scale}
    out, lse = TorchKernel().attend_with_lse(*made, **options)
    expected, expected_lse = formula(*made, mask, causal, scale)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.device.type, lse.device.type) == (torch.device(device).type,) * 2
    seen = ~expected_lse.isinf()
    assert torch.equal(lse.cpu().isinf(), ~seen)
    bound = BOUNDS[dtype]
    assert float((lse.cpu().double() - expected_lse)[seen].abs().max()) <= bound
    difference = (out.cpu().double() - expected)[seen]
    assert not difference.isnan().any()
    assert float(difference.abs().max()) <= bound
    plain = TorchKernel().attend(*made, **options).cpu().double()
    assert float((plain - expected)[seen].abs().max()) <= bound
